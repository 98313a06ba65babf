"""Questions about a run at rest: what a step read, and whether it comes out the same again."""

from __future__ import annotations

import json
from pathlib import Path

from trinity.core.config import RunConfig
from trinity.core.errors import ConfigError
from trinity.parallel.stage import StepCounts
from trinity.train.corruption import Replay, replay_mismatches
from trinity.train.interventions import read_interventions
from trinity.train.run import RECORD_FILE, Run, read_run_config, rows_of_step
from trinity.train.step import num_counted
from trinity.train.streams import AnyLoader, make_loader, open_dataset


def documents_of_step(directory: Path, step: int) -> list[str]:
    """The documents in each row of step ``step``, numbered as in the record, as lines of text.

    The data order is a pure function of fingerprint, seed, row and the windows that are skipped, so
    nothing needs to have been recorded. Raises ConfigError when the sources are no longer those of
    the run.
    """
    config, loader = loader_of(directory)
    return loader.describe_rows(rows_of_step(loader, config.batch, step))


def loader_of(directory: Path) -> tuple[RunConfig, AnyLoader]:
    """Configuration and data stream of a run, with all that it skips. Raises ConfigError."""
    config = read_run_config(directory, [])
    record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
    dataset = open_dataset(config)
    if dataset.fingerprint != record["data_fingerprint"]:
        raise ConfigError(
            f"{directory} was trained on data with fingerprint {record['data_fingerprint']}, the "
            f"sources now give {dataset.fingerprint}; bring the old sources back"
        )
    loader = make_loader(config, dataset)
    for entry in read_interventions(directory):
        loader.skip_rows(entry.first_row, entry.end_row)
    return config, loader


def replay_next_step(run: Run) -> Replay:
    """Pass forward and backward through the next step of a run twice, and three times if need be.

    Collective. Nothing is trained.
    """
    microbatches = run.next_microbatches()
    num_rows = sum(len(batch[0]) for batch in microbatches) * run.model.layout.dp
    counts = StepCounts(num_counted(run.model, microbatches).sum(), num_rows)
    run.optimizers.zero_grad()
    run.model.pipeline.forward_backward(microbatches, counts)
    return replay_mismatches(run.model, microbatches, counts)
