"""Rows of images: the same stream under any number of processes, full epochs, full rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trinity.core.errors import ConfigError, DataError
from trinity.core.images_config import ImagesConfig
from trinity.data.build import TRAIN
from trinity.data.image_rows import (
    ImageLoader,
    ImageRows,
    held_out_images,
    scale_at,
    tokens_at_scale,
)
from trinity.data.images import ImageDataset, build_images

NUM_IMAGES = 23
SCALES = (1, 2, 4)
SHARES = (0.5, 0.3, 0.2)
PINNED_FIRST_ROW = [
    (22, 0, 4),
    (25, 0, 1),
    (12, 0, 2),
    (17, 0, 2),
    (26, 0, 2),
    (18, 0, 2),
    (9, 0, 4),
    (23, 1, 4),
]
PINNED = "00761a590d5c1b74"
Drawn = tuple[tuple[int, tuple[tuple[int, int, int, bytes], ...]], ...]


@pytest.fixture
def config(tmp_path: Path) -> ImagesConfig:
    """Two sources of 4 x 8 pixels: 23 images, and 7 that come half as often."""
    generator = torch.Generator().manual_seed(0)
    sources = []
    for name, count in (("many", NUM_IMAGES), ("few", 7)):
        latents = torch.randn(count, 1, 4, 8, generator=generator)
        path = tmp_path / f"{name}.safetensors"
        save_file({"latents": latents, "labels": torch.arange(count)}, path)
        sources.append({"name": name, "format": "latents", "path": str(path)})
    sources[1]["weight"] = 0.5
    return ImagesConfig.model_validate(
        {
            "sources": sources,
            "height": 4,
            "width": 8,
            "lanes": 4,
            "held_out_fraction": 0.0,
            "coarse_shares": SHARES,
        }
    )


def _with(config: ImagesConfig, **values: Any) -> ImagesConfig:
    return ImagesConfig.model_validate({**config.model_dump(), **values})


def _only_one(config: ImagesConfig, **values: Any) -> ImagesConfig:
    return _with(config, sources=[config.sources[0].model_dump()], **values)


def _data(config: ImagesConfig) -> ImageDataset:
    return build_images(config, channels=1, seed=0)


def _loader(config: ImagesConfig, rank: int = 0, world_size: int = 1, **values: Any) -> ImageLoader:
    settings: dict[str, Any] = {"patch_size": 1, "patch_scales": SCALES, "sequence_length": 70}
    settings |= {"seed": 3, "rank": rank, "world_size": world_size, **values}
    return ImageLoader(_data(config), config, **settings)


def _plain(got: ImageRows) -> Drawn:
    """Comparable: (row number, its images with their pixels) of every row."""
    return tuple(
        (number, tuple((p.number, p.epoch, p.scale, p.pixels.numpy().tobytes()) for p in row))
        for number, row in zip(got.row_numbers, got.rows, strict=True)
    )


def _joined(ranks: list[ImageLoader], num_rows: int) -> Drawn:
    return tuple(sorted(row for rank in ranks for row in _plain(rank.next_rows(num_rows))))


@pytest.mark.parametrize("step_rows", [[], [4, 8, 12]])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_stream_is_the_same_under_any_number_of_processes(
    config: ImagesConfig, world_size: int, step_rows: list[int]
) -> None:
    """Dealt out in blocks, and with lanes of their own."""
    alone = _loader(config, step_rows=step_rows)
    ranks = [_loader(config, r, world_size, step_rows=step_rows) for r in range(world_size)]
    assert [rank.own_lanes is not None for rank in ranks] == [bool(step_rows)] * world_size
    for num_rows in (4, 8, 12):
        before = alone.next_row
        expected = _plain(alone.next_rows(num_rows))
        assert [number for number, _ in expected] == list(range(before, before + num_rows))
        assert _joined(ranks, num_rows) == expected
    if not step_rows:
        assert all(_same(rank.state(), alone.state()) for rank in ranks)
        with pytest.raises(ValueError, match="cannot be divided"):
            ranks[0].next_rows(world_size + 1)
        return
    for number, rank in enumerate(ranks):
        own = rank.own_lanes
        assert own is not None
        assert list(own) == [i for i in range(4) if i * world_size // 4 == number]
        planned = [rows > 0 for rows in rank._planner.num_rows]
        assert planned == [lane in own for lane in range(4)]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("step_rows", [[], [4]])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(
    config: ImagesConfig, before: int, after: int, step_rows: list[int]
) -> None:
    uninterrupted = _loader(config, step_rows=step_rows)
    ranks = [_loader(config, r, before, step_rows=step_rows) for r in range(before)]
    for _ in range(5):
        uninterrupted.next_rows(4)
        for rank in ranks:
            rank.next_rows(4)
    states = [rank.state() for rank in ranks]
    assert states[0]["num_drawn"].shape == ((4 // before if step_rows else 4), 2)
    whole = {name: array.copy() for name, array in states[0].items()}
    if step_rows:
        whole["num_drawn"] = np.concatenate([state["num_drawn"] for state in states])
    resumed = []
    for number in range(after):
        loader = _loader(config, number, after, step_rows=step_rows)
        own = loader.own_lanes or range(4)
        loader.load_state({**whole, "num_drawn": whole["num_drawn"][own.start : own.stop]})
        resumed.append(loader)
    for num_rows in (4, 12):
        assert _joined(resumed, num_rows) == _plain(uninterrupted.next_rows(num_rows))


def test_a_state_goes_back_as_well_and_is_not_changed_by_what_follows(
    config: ImagesConfig,
) -> None:
    loader = _loader(config)
    loader.next_rows(5)
    state = loader.state()
    first = _plain(loader.next_rows(9))
    loader.load_state(state)
    assert _plain(loader.next_rows(9)) == first
    with pytest.raises(ValueError, match="row 3 was planned already"):
        loader.describe_rows([3])


def test_the_stream_is_pinned(config: ImagesConfig) -> None:
    """A change of what a seed means must be one on purpose: it breaks resuming."""
    rows = _loader(config).next_rows(20).rows
    placed = [[(p.number, p.epoch, p.scale) for p in row] for row in rows]
    assert placed[0] == PINNED_FIRST_ROW
    assert hashlib.sha256(repr(placed).encode()).hexdigest()[:16] == PINNED


def test_other_seeds_give_other_streams(config: ImagesConfig) -> None:
    one, other = (_plain(_loader(config, seed=seed).next_rows(4)) for seed in (3, 4))
    assert one != other


@pytest.mark.parametrize("lanes", [1, 4, 5])
def test_every_image_comes_once_per_epoch_in_a_new_order(config: ImagesConfig, lanes: int) -> None:
    """One image per row: the rows of an epoch are a permutation, whatever the lanes."""
    single = _only_one(config, lanes=lanes, coarse_shares=())
    loader = _loader(single, sequence_length=32)
    rows = loader.next_rows(3 * NUM_IMAGES).rows
    assert [len(row) for row in rows] == [1] * len(rows)
    numbers = [row[0].number for row in rows]
    epochs = [row[0].epoch for row in rows]
    assert epochs == [e for e in range(3) for _ in range(NUM_IMAGES)]
    orders = [tuple(numbers[e * NUM_IMAGES : (e + 1) * NUM_IMAGES]) for e in range(3)]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(NUM_IMAGES)) for order in orders)


def test_every_image_comes_once_per_epoch_also_where_lanes_run_apart(
    config: ImagesConfig,
) -> None:
    rows = _loader(_only_one(config)).next_rows(200).rows
    seen = Counter((p.epoch, p.number) for row in rows for p in row)
    assert set(seen.values()) == {1}
    whole = [e for e in range(30) if all((e, n) in seen for n in range(NUM_IMAGES))]
    assert len(whole) > 20
    assert whole == list(range(len(whole)))


def test_rows_are_full_and_never_too_full(config: ImagesConfig) -> None:
    """Of 70 tokens, at 32, 8 and 2 a piece; the shares count where all scales fit."""
    rows = _loader(config).next_rows(400).rows
    tokens = {1: 32, 2: 8, 4: 2}
    first: Counter[int] = Counter()
    for row in rows:
        used = [tokens[p.scale] for p in row]
        assert 70 - 2 < sum(used) <= 70
        first[row[0].scale] += 1
    for scale, share in zip(SCALES, SHARES, strict=True):
        assert abs(first[scale] / 400 - share) < 3 * (share * (1 - share) / 400) ** 0.5
    after_two_of_the_finest = [row[2].scale for row in rows if [p.scale for p in row[:2]] == [1, 1]]
    assert len(after_two_of_the_finest) > 20
    assert set(after_two_of_the_finest) == {4}  # 6 tokens are left


def test_shares_choose_the_scales(config: ImagesConfig) -> None:
    for shares, scales in (((), {1}), ((0.0, 1.0, 0.0), {2}), ((0.0, 2.0, 3.0), {2, 4})):
        rows = _loader(_with(config, coarse_shares=shares)).next_rows(12).rows
        assert {p.scale for row in rows for p in row} == scales


@pytest.mark.parametrize(
    ("fraction", "fits", "index"),
    [
        (1e-9, (True, True, True), 0),
        (0.5, (True, True, True), 0),
        (0.51, (True, True, True), 2),
        (1.0, (True, True, True), 2),
        (0.01, (False, True, True), 2),
        (1.0, (True, True, False), 0),
        (0.5, (False, True, False), None),
    ],
)
def test_scale_at(fraction: float, fits: tuple[bool, ...], index: int | None) -> None:
    assert scale_at(fraction, (0.5, 0.0, 0.5), fits) == index


def test_sources_mix_by_weight(config: ImagesConfig) -> None:
    rows = _loader(config).next_rows(60).rows
    few = sum(p.number >= NUM_IMAGES for row in rows for p in row)
    every = sum(len(row) for row in rows)
    assert abs(few / every - 1 / 3) < 0.02
    again = {(p.epoch, p.number) for row in rows for p in row}
    assert len(again) == every


def test_skipped_rows_are_passed_over_but_use_up_their_images(config: ImagesConfig) -> None:
    plain = _plain(_loader(config).next_rows(24))
    skipping = _loader(_with(config, skip_rows=[(4, 8)]))
    assert _plain(skipping.next_rows(8)) == plain[:4] + plain[8:12]
    skipping.skip_rows(16, 20)
    assert skipping.rows_after(8, 8) == [12, 13, 14, 15, 20, 21, 22, 23]
    assert _plain(skipping.next_rows(8)) == plain[12:16] + plain[20:24]
    assert skipping.next_row == 24
    with pytest.raises(DataError, match=r"multiples of images\.lanes=4"):
        _loader(config, 0, 2, step_rows=[4]).skip_rows(3, 8)


def test_pixels_and_classes_are_those_of_the_dataset(config: ImagesConfig) -> None:
    dataset = _data(config)
    for threads in (1, 3):
        loader = _loader(_with(config, decode_threads=threads))
        for placed in [p for row in loader.next_rows(8).rows for p in row]:
            pixels, condition = dataset.read(TRAIN, placed.number)
            assert torch.equal(placed.pixels, pixels)
            assert placed.condition == condition == placed.number % NUM_IMAGES


def test_half_of_the_training_images_are_mirrored() -> None:
    values = {"sources": [{"name": "d", "format": "digits"}], "height": 8, "width": 8}
    config = ImagesConfig.model_validate({**values, "flip": True})
    dataset = _data(config)
    loader = ImageLoader(
        dataset, config, patch_size=4, sequence_length=4, seed=0, rank=0, world_size=1
    )
    mirrored = 0
    for (placed,) in loader.next_rows(400).rows:
        pixels = dataset.read(TRAIN, placed.number)[0]
        is_mirrored = torch.equal(placed.pixels, pixels.flip(-1))
        assert is_mirrored or torch.equal(placed.pixels, pixels)
        mirrored += is_mirrored
    assert abs(mirrored - 200) < 30
    lines = loader.describe_rows(range(400, 500))
    assert 30 < sum(line.endswith("mirrored") for line in lines) < 70


def test_rows_are_described_by_source(config: ImagesConfig) -> None:
    lines = _loader(config).describe_rows(range(3))
    rows = _loader(config).next_rows(3).rows
    expected = []
    for number, row in enumerate(rows):
        for p in row:
            few = p.number >= NUM_IMAGES
            name = f"few image {p.number - NUM_IMAGES}" if few else f"many image {p.number}"
            expected.append(f"row {number}: {name}, epoch {p.epoch}, patch scale {p.scale}")
    assert lines == expected


@pytest.mark.parametrize(
    ("extent", "scale", "tokens"),
    [((4, 8), 1, 32), ((4, 8), 4, 2), ((6, 4, 8), 2, 48), ((1, 4, 8), 2, 8)],
)
def test_tokens_of_images_and_videos(extent: tuple[int, ...], scale: int, tokens: int) -> None:
    assert tokens_at_scale(extent, scale, patch_size=1) == tokens
    if len(extent) == 3 and extent[0] == 6:
        assert tokens_at_scale(extent, scale, patch_size=1, patch_frames=2) == tokens // 2
        with pytest.raises(ConfigError, match=r"frames=6.*4 frames"):
            tokens_at_scale(extent, scale, patch_size=1, patch_frames=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_scales": (1, 2)}, r"coarse_shares=\[0\.5, 0\.3, 0\.2\] must have one number for"),
        ({"sequence_length": 31}, r"batch\.sequence_length=31 is less than the 32 tokens"),
        ({"patch_size": 2}, r"patches of 8 \(model\.patch_size=2 at scale 4\)"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    config: ImagesConfig, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _loader(config, **values)


def test_held_out_images_are_fixed_and_never_trained_on(config: ImagesConfig) -> None:
    halved = _with(config, held_out_fraction=0.4)
    dataset = _data(halved)
    batches = held_out_images(dataset, 6, batch_rows=2, images_per_row=2, scale=2)
    again = held_out_images(dataset, 6, batch_rows=2, images_per_row=2, scale=2)
    assert list(batches) == ["many", "few"]
    assert [_plain(b) for b in batches["many"]] == [_plain(b) for b in again["many"]]
    assert [[len(row) for row in b.rows] for b in batches["many"]] == [[2, 2], [2]]
    assert [b.row_numbers for b in batches["many"]] == [[0, 1], [2]]

    def seen(rows: list[list[Any]]) -> set[bytes]:
        return {p.pixels.numpy().tobytes() for row in rows for p in row}

    every: list[Tensor] = []
    for batch in batches["many"] + batches["few"]:
        for placed in [p for row in batch.rows for p in row]:
            pixels, label = dataset.read("held-out", placed.number)
            assert torch.equal(placed.pixels, pixels)
            assert (placed.condition, placed.scale) == (label, 2)
            every.append(pixels)
    held_out = {t.numpy().tobytes() for t in every}
    assert len(held_out) == len(every)
    train = seen(_loader(halved).next_rows(40).rows)
    assert len(train) == dataset.num_images(TRAIN)
    assert not train & held_out
    assert held_out_images(_data(config), 6, batch_rows=2) == {}
