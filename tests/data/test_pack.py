"""Packing: nothing lost, nothing twice, weights kept, long documents mixed, exact resume."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from trinity.data.pack import RowPlanner, Span, permuted, stream_key

ROW = 32


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4099])
def test_permutation_is_a_bijection_and_depends_on_its_key(size: int) -> None:
    images = [permuted(i, size, key=11) for i in range(size)]
    assert sorted(images) == list(range(size))
    if size > 60:
        assert images != [permuted(i, size, key=12) for i in range(size)]
        assert images != sorted(images)


def _planner(lengths: list[list[int]], **changes: Any) -> RowPlanner:
    options: dict[str, Any] = {
        "weights": [1.0] * len(lengths),
        "sequence_length": ROW,
        "packing": "rsdb",
        "buffer_documents": 8,
        "num_lanes": 2,
        "seed": 5,
    }
    options |= changes
    return RowPlanner([np.array(x) for x in lengths], **options)


def _lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths from one token to several rows."""
    generator = random.Random(seed)
    return [max(1, int(generator.lognormvariate(2.5, 1.3))) for _ in range(count)]


def _rows(planner: RowPlanner, count: int) -> list[list[Span]]:
    return [planner.row(i) for i in range(count)]


@pytest.mark.parametrize("packing", ["rsdb", "sequential"])
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_every_token_once_per_epoch_and_in_order(packing: str, num_lanes: int) -> None:
    lengths = _lengths(60)
    planner = _planner([lengths], packing=packing, num_lanes=num_lanes)
    reads: dict[int, list[Span]] = defaultdict(list)
    for row in _rows(planner, 400):
        assert sum(span.length for span in row) == ROW
        for span in row:
            assert span.length > 0
            reads[span.document].append(span)
    assert set(reads) == set(range(60))
    for document, spans in reads.items():
        if num_lanes == 1 and packing == "sequential":
            expected = 0
            for span in spans:  # each read goes on where the last one stopped, then starts over
                assert span.start == expected
                expected = (span.start + span.length) % lengths[document]
        epochs = Counter(token for s in spans for token in range(s.start, s.start + s.length))
        counts = [epochs[token] for token in range(lengths[document])]
        # An epoch is finished before the next begins, up to what is open at the moment.
        assert max(counts) - min(counts) <= 2


def test_first_epoch_is_read_in_order_without_gaps() -> None:
    lengths = _lengths(200)
    planner = _planner([lengths], num_lanes=1)
    heads: Counter[int] = Counter()
    finished: set[int] = set()
    for row in _rows(planner, 60):
        for span in row:
            if span.document in finished:
                continue  # a second epoch of a short document
            assert span.start == heads[span.document]
            heads[span.document] += span.length
            if heads[span.document] == lengths[span.document]:
                finished.add(span.document)
    assert len(finished) > 20


@pytest.mark.parametrize("packing", ["rsdb", "sequential"])
def test_tokens_follow_the_weights(packing: str) -> None:
    """Sources whose documents differ in length by two orders still get their share of tokens."""
    planner = _planner(
        [[5] * 300, [700] * 40, [60] * 100], weights=[1.0, 2.0, 5.0], packing=packing, num_lanes=1
    )
    tokens: Counter[int] = Counter()
    for row in _rows(planner, 3000):
        for span in row:
            tokens[span.source] += span.length
    total = sum(tokens.values())
    for source, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert tokens[source] / total == pytest.approx(share, abs=0.05)


def test_the_buffer_spreads_long_documents() -> None:
    """Sequential packing fills whole rows with one long document; the buffer does not.

    The measure of the report is the spread of a step's microbatches; here the longest run of
    consecutive rows that one document touches.
    """
    lengths = [[ROW * 12] * 20 + [6] * 300]

    def longest_run(packing: str) -> int:
        planner = _planner(lengths, packing=packing, buffer_documents=16, num_lanes=1)
        longest, run, previous = 0, 0, set[int]()
        for row in _rows(planner, 200):
            current = {span.document for span in row}
            run = run + 1 if current & previous else 1
            longest, previous = max(longest, run), current
        return longest

    assert longest_run("sequential") >= 12
    assert longest_run("rsdb") < longest_run("sequential")


@pytest.mark.parametrize("packing", ["rsdb", "sequential"])
def test_state_resumes_exactly_and_equals_a_replay(packing: str) -> None:
    lengths = [_lengths(40), _lengths(25, seed=1)]
    whole = _rows(_planner(lengths, packing=packing, num_lanes=3), 90)
    for cut in (0, 1, 2, 17, 44, 45, 46, 89):
        first = _planner(lengths, packing=packing, num_lanes=3)
        _rows(first, cut)
        state = {name: array.copy() for name, array in first.state(cut).items()}
        resumed = _planner(lengths, packing=packing, num_lanes=3)
        resumed.load_state(state)
        assert [resumed.row(i) for i in range(cut, 90)] == whole[cut:]
        replayed = _planner(lengths, packing=packing, num_lanes=3)  # from nothing but the number
        assert [replayed.row(i) for i in range(cut, 90)] == whole[cut:]
        again = _planner(lengths, packing=packing, num_lanes=3).state(cut)
        assert all(np.array_equal(again[name], state[name]) for name in state)


def test_rows_depend_on_the_seed_and_cannot_go_back() -> None:
    lengths = [_lengths(40)]
    assert _rows(_planner(lengths), 9) != _rows(_planner(lengths, seed=6), 9)
    planner = _planner(lengths)
    _rows(planner, 4)
    with pytest.raises(ValueError, match="planned already"):
        planner.row(1)


def test_sources_smaller_than_the_buffer_and_empty_documents() -> None:
    planner = _planner([[0, 3, 0], [500]], buffer_documents=64)
    documents = {(s.source, s.document) for row in _rows(planner, 50) for s in row}
    assert documents == {(0, 1), (1, 0)}


def test_keys_differ() -> None:
    assert stream_key("a", 1) != stream_key("a", 2) != stream_key("b", 1)
