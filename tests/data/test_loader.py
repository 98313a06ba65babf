"""Batches: targets, document ids, and the same global order at any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trinity.core.batch import Batch
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.data.build import Dataset, build_dataset
from trinity.data.loader import Loader, held_out_rows, read_rows
from trinity.data.pack import Span

ROW = 48


@pytest.fixture
def config(tiny_toml: Path) -> Config:
    return load_config(tiny_toml, ["data.lanes=3"])


@pytest.fixture
def dataset(config: Config) -> Dataset:
    return build_dataset(config.data, config.seed, config.model.vocab_size)


def _loader(dataset: Dataset, config: Config, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(
        dataset,
        config.data,
        sequence_length=ROW,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


def _equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_targets_are_the_next_token_of_the_same_document(dataset: Dataset) -> None:
    documents = dataset.sources[0].train
    lengths = documents.lengths
    long = int(lengths.argmax())
    short = int(lengths.argmin())
    end = int(lengths[long])
    rows = [
        [Span(0, long, 3, 10), Span(0, short, 0, int(lengths[short])), Span(0, long, end - 4, 4)]
    ]
    batch = read_rows([documents], rows)
    tokens, targets = batch.tokens_BS[0], batch.targets_BS[0]
    whole = documents.read(long, 0, end).tolist()
    assert tokens[:10].tolist() == whole[3:13]
    assert targets[:10].tolist() == whole[4:14]  # the last one is peeked at
    middle = int(lengths[short])
    assert targets[10 + middle - 1] == -100  # the document ends
    assert targets[10 : 10 + middle - 1].tolist() == tokens[11 : 10 + middle].tolist()
    assert targets[-4:].tolist() == [*whole[-3:], -100]
    assert batch.document_ids_BS[0].tolist() == [0] * 10 + [1] * middle + [2] * 4
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.int32]


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_at_any_world_size(
    dataset: Dataset, config: Config, world_size: int
) -> None:
    alone = _loader(dataset, config)
    ranks = [_loader(dataset, config, rank, world_size) for rank in range(world_size)]
    for num_rows in (4, 4, 8, 12):
        expected = alone.next_rows(num_rows)
        parts = [rank.next_rows(num_rows) for rank in ranks]
        joined = Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        assert _equal(joined, expected)
    for rank in ranks:  # any rank's state is everybody's state
        for name, array in alone.state().items():
            assert np.array_equal(array, rank.state()[name]), name
    with pytest.raises(ValueError, match="cannot be divided"):
        ranks[0].next_rows(5)


def test_ranks_with_lanes_of_their_own_read_the_same_rows_and_plan_no_others(
    dataset: Dataset, config: Config
) -> None:
    """Steps of 6 and 12 rows over 3 lanes, on 1 and 3 ranks; then resumed by one."""

    def loader(rank: int, world_size: int) -> Loader:
        return Loader(
            dataset,
            config.data,
            sequence_length=ROW,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            step_rows=[6, 12],
        )

    alone, ranks = loader(0, 1), [loader(rank, 3) for rank in range(3)]
    assert [rank.own_lanes for rank in ranks] == [range(0, 1), range(1, 2), range(2, 3)]
    for num_rows in (6, 12, 6):
        expected = alone.next_rows(num_rows).tokens_BS
        got = torch.stack([rank.next_rows(num_rows).tokens_BS for rank in ranks], 1).flatten(0, 1)
        assert torch.equal(got, expected)
    for number, rank in enumerate(ranks):
        planned = [lane.num_rows for lane in rank._planner.lanes]
        assert planned == [8 if lane == number else 0 for lane in range(3)]
    states = [rank.state() for rank in ranks]
    joined = {name: np.concatenate([state[name] for state in states]) for name in states[0]}
    joined["next_row"] = states[0]["next_row"]
    resumed = loader(0, 1)
    resumed.load_state(joined)
    assert _equal(resumed.next_rows(6), alone.next_rows(6))
    assert (
        Loader(
            dataset, config.data, sequence_length=ROW, seed=0, rank=0, world_size=3, step_rows=[4]
        ).own_lanes
        is None
    )


def test_state_carries_over_to_another_world_size(dataset: Dataset, config: Config) -> None:
    alone = _loader(dataset, config)
    alone.next_rows(7)
    state = {name: array.copy() for name, array in alone.state().items()}
    expected = alone.next_rows(8)
    parts = []
    for rank in range(2):
        resumed = _loader(dataset, config, rank, 2)
        resumed.load_state(state)
        parts.append(resumed.next_rows(8))
    joined = Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    assert _equal(joined, expected)


def test_held_out_batches_are_fixed_and_never_trained_on(dataset: Dataset) -> None:
    first, again = (held_out_rows(dataset, ROW, 5, batch_rows=2) for _ in range(2))
    assert list(first) == ["fixture"]
    assert [len(batch.tokens_BS) for batch in first["fixture"]] == [2, 2, 1]
    assert all(_equal(a, b) for a, b in zip(first["fixture"], again["fixture"], strict=True))
    source = dataset.sources[0]

    def texts(documents: object, count: int) -> set[bytes]:
        return {documents.read(i, 0, 10**6).tobytes() for i in range(count)}  # type: ignore

    train, held_out = (texts(s, len(s)) for s in (source.train, source.held_out))
    assert train
    assert held_out
    assert not train & held_out


def test_describe_rows_names_what_a_batch_holds(dataset: Dataset, config: Config) -> None:
    lines = _loader(dataset, config).describe_rows(range(2))
    batch = _loader(dataset, config).next_rows(2)
    num_reads = int((batch.document_ids_BS.max(dim=1).values + 1).sum())
    assert len(lines) == num_reads
    assert lines[0].startswith("row 0: fixture document ")
