"""Rows that are passed over and documents that are never opened."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trinity.core.config import Config
from trinity.core.errors import ConfigError, DataError
from trinity.core.load_config import load_config
from trinity.data.build import Dataset, build_dataset
from trinity.data.loader import Loader
from trinity.data.windows import RowWindows, read_excluded, without_documents


def test_windows_join_and_are_passed_over() -> None:
    windows = RowWindows([(10, 12), (4, 6)])
    windows.add(6, 7)
    assert windows.windows == [(4, 7), (10, 12)]
    assert windows.take(2, 5) == ([2, 3, 7, 8, 9], 10)
    assert windows.take(10, 2) == ([12, 13], 14)
    assert windows.take(5, 1) == ([7], 8)


def test_taking_in_pieces_equals_counting() -> None:
    choose = random.Random(0)
    for _ in range(100):
        windows = RowWindows()
        for _ in range(choose.randrange(4)):
            first = choose.randrange(40)
            windows.add(first, first + 1 + choose.randrange(8))
        naive = [r for r in range(200) if not any(a <= r < b for a, b in windows.windows)]
        taken: list[int] = []
        row = 0
        while len(taken) < 60:
            rows, row = windows.take(row, choose.randrange(1, 9))
            taken += rows
        assert taken == naive[: len(taken)]
        assert [windows.row_at(count) for count in range(60)] == naive[:60]


@pytest.fixture
def config(tiny_toml: Path) -> Config:
    return load_config(tiny_toml)


@pytest.fixture
def dataset(config: Config) -> Dataset:
    return build_dataset(config.data, config.seed, config.model.vocab_size)


def _loader(dataset: Dataset, config: Config, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(
        dataset,
        config.data,
        sequence_length=32,
        seed=1,
        rank=rank,
        world_size=world_size,
        step_rows=[4],
    )


def _with(config: Config, **fields: object) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=fields)})


def test_a_loader_reads_the_same_rows_without_the_skipped_ones(
    dataset: Dataset, config: Config
) -> None:
    plain = _loader(dataset, config)
    rows = torch.cat([plain.next_rows(4).tokens_BS for _ in range(8)])
    kept = [r for r in range(32) if not 6 <= r < 14]
    skipping = _loader(dataset, _with(config, skip_rows=((6, 14),)))
    skipped = torch.cat([skipping.next_rows(4).tokens_BS for _ in range(6)])
    assert torch.equal(skipped, rows[kept])
    assert skipping.next_row == 32
    # The same, told half way, and after a stop inside the window.
    late = _loader(dataset, config)
    first = late.next_rows(4).tokens_BS
    late.skip_rows(6, 14)
    resumed = _loader(dataset, config)
    resumed.load_state(late.state())
    resumed.skip_rows(6, 14)
    rest = torch.cat([resumed.next_rows(4).tokens_BS for _ in range(5)])
    assert torch.equal(torch.cat((first, rest)), rows[kept])
    assert resumed.rows_after(4, 4) == [4, 5, 14, 15]


def test_ranks_share_what_is_left(dataset: Dataset, config: Config) -> None:
    skipping = _with(config, skip_rows=((4, 8),))
    whole = _loader(dataset, skipping)
    ranks = [_loader(dataset, skipping, rank, 2) for rank in range(2)]
    for _ in range(3):
        rows = {tuple(row) for row in whole.next_rows(4).tokens_BS.tolist()}
        parts = [tuple(r) for own in ranks for r in own.next_rows(4).tokens_BS.tolist()]
        assert len(parts) == 4
        assert rows == set(parts)
    with pytest.raises(DataError, match=r"multiples of data.lanes=2"):
        ranks[0].skip_rows(13, 15)


def test_excluded_documents_are_never_opened(
    dataset: Dataset, config: Config, tmp_path: Path
) -> None:
    lines = _loader(dataset, config).describe_rows(range(40))
    first, second = (line.split()[4].rstrip(",") for line in (lines[0], lines[-1]))
    listed = tmp_path / "never.txt"
    listed.write_text(f"# bad ones\nfixture {first}\nfixture document {second}, tokens 0..7\n")
    loader = _loader(dataset, _with(config, exclude_documents=str(listed)))
    text = "\n".join(loader.describe_rows(range(200)))
    assert f" document {first}," not in text
    assert f" document {second}," not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("elsewhere 3", "line 1: 'elsewhere 3' is no"),
        ("fixture three", 'is no "source number"'),
        ("fixture 999999", "documents, numbered from 0"),
    ],
)
def test_a_list_that_names_nothing_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "list").write_text(line)
    with pytest.raises(DataError, match=message):
        read_excluded(tmp_path / "list", ["fixture"], [10])


def test_a_source_must_keep_a_document() -> None:
    with pytest.raises(DataError, match="without a document"):
        without_documents([np.array([3, 0, 2])], {0: [0, 2]})


@pytest.mark.parametrize("windows", ["[[4,4]]", "[[8,4]]", "[[0,4],[4,8]]", "[[0,4],[2,8]]"])
def test_windows_of_a_configuration_must_ascend(tiny_toml: Path, windows: str) -> None:
    with pytest.raises(ConfigError, match="skip_rows"):
        load_config(tiny_toml, [f"data.skip_rows={windows}"])
