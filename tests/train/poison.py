"""Runs that meet corrupted rows, for the tests of what is done about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from trinity.core import job
from trinity.core.batch import Batch
from trinity.core.load_config import load_any_config
from trinity.data.image_rows import ImageLoader, ImageRows
from trinity.data.loader import Loader
from trinity.train.loop import pretrain
from trinity.train.run import Run, create_run_directory

SMALL = [
    "train.validate_every_steps=0",
    "train.precision=fp32",
    "log.tensorboard=false",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=0",
    "log.instruments_every_steps=0",
    "stability.min_steps=10",
]
"""A run of a hundred steps within seconds."""
OF_TEXT = ["model.num_hidden_layers=2", "data.lanes=2"]
OF_IMAGES = ["model.layer_pattern=WE*E", "images.lanes=2"]
"""More of the same."""
GOES_BACK = [
    "stability.skip_spikes=true",
    "train.num_steps=28",
    "rewind.enabled=true",
    "rewind.spikes=2",
    "rewind.pad_steps=1",
    "rewind.snapshot_every_steps=10",
]
"""Meets rows 80 to 95 in steps 21 to 24 and rewinds; 28 steps."""


@contextlib.contextmanager
def poisoned(rows: range) -> Iterator[None]:
    """Inside, these rows of the global stream hold one token after another instead of text.

    Rows of images hold noise far brighter than any picture.
    """
    plain = Loader.next_rows

    def next_rows(self: Loader, num_rows: int) -> Batch:
        taken = self.skipped.take(self.next_row, num_rows)[0]
        share = num_rows // self._world_size
        mine = taken[self._rank * share : (self._rank + 1) * share]
        if self.own_lanes is not None:
            mine = [row for row in taken if row % self._planner.num_lanes in self.own_lanes]
        batch = plain(self, num_rows)
        for place, row in enumerate(mine):
            if row in rows:
                generator = torch.Generator().manual_seed(row)
                noise = torch.randint(0, 400, batch.tokens_BS[place].shape, generator=generator)
                batch.tokens_BS[place] = noise
                batch.targets_BS[place] = noise.flip(0)
        return batch

    plain_images = ImageLoader.next_rows

    def next_images(self: ImageLoader, num_rows: int) -> ImageRows:
        got = plain_images(self, num_rows)
        for number, images in zip(got.row_numbers, got.rows, strict=True):
            if number in rows:
                images[:] = [p._replace(pixels=_glare(number, p.pixels.shape)) for p in images]
        return got

    with (
        mock.patch.object(Loader, "next_rows", next_rows),
        mock.patch.object(ImageLoader, "next_rows", next_images),
    ):
        yield


def _glare(row: int, shape: torch.Size) -> torch.Tensor:
    return 20 * torch.randn(shape, generator=torch.Generator().manual_seed(row))


def train(
    toml: Path,
    directory: Path,
    overrides: Sequence[str],
    rows: range = range(0),
    *,
    resume: bool = False,
) -> Run:
    """A whole run on this process, or on every rank of a job; ``rows`` are corrupted."""
    kind = OF_IMAGES if "[images]" in toml.read_text() else OF_TEXT
    config = load_any_config(toml, [*SMALL, *kind, *overrides])
    if not resume and job.is_first():
        create_run_directory(directory, config)
    job.barrier()
    with poisoned(rows):
        return pretrain(config, directory, torch.device("cpu"), resume=resume)
