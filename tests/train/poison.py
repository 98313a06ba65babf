"""Runs that meet corrupted rows, for the tests of what is done about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from trinity.core import job
from trinity.core.batch import Batch
from trinity.core.load_config import load_config
from trinity.data.loader import Loader
from trinity.train.loop import pretrain
from trinity.train.run import Run, create_run_directory

SMALL = [
    "model.num_hidden_layers=2",
    "data.lanes=2",
    "train.validate_every_steps=0",
    "train.precision=fp32",
    "log.tensorboard=false",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=0",
    "log.instruments_every_steps=0",
    "stability.min_steps=10",
]
"""A run of a hundred steps within seconds."""
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
    """Inside, these rows of the global stream hold one token after another instead of text."""
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

    with mock.patch.object(Loader, "next_rows", next_rows):
        yield


def train(
    toml: Path,
    directory: Path,
    overrides: Sequence[str],
    rows: range = range(0),
    *,
    resume: bool = False,
) -> Run:
    """A whole run on this process, or on every rank of a job; ``rows`` are corrupted."""
    config = load_config(toml, [*SMALL, *overrides])
    if not resume and job.is_first():
        create_run_directory(directory, config)
    job.barrier()
    with poisoned(rows):
        return pretrain(config, directory, torch.device("cpu"), resume=resume)
