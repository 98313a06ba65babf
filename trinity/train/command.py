"""What the command line does for training: open or resume a run, train, say what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from trinity.core import job
from trinity.core.config import RunConfig
from trinity.core.errors import ConfigError, TrainingError, TrinityError
from trinity.core.load_config import load_any_config
from trinity.core.runtime import SAVED_AND_STOPPED_EXIT_CODE
from trinity.models.lm import LanguageModel
from trinity.train.corruption import replica_mismatches
from trinity.train.inspect import documents_of_step, loader_of, replay_next_step
from trinity.train.interventions import INTERVENTIONS_FILE, Intervention, add_intervention
from trinity.train.lock import held
from trinity.train.loop import pretrain
from trinity.train.metrics import read_metrics
from trinity.train.run import (
    CONFIG_FILE,
    Run,
    create_run_directory,
    default_run_directory,
    open_run,
    read_run_config,
    rows_of_step,
)
from trinity.train.sample import sample_text
from trinity.train.sample_images import sample_grid
from trinity.train.streams import open_dataset

SAMPLE_TOKENS = 80
STOPPED_STATUS_VARIABLE = "TRINITY_STOPPED_STATUS"
"""Exit status of a run that was stopped and saved, for launchers that take 75 for a failure."""


def pretrain_command(
    arguments: Sequence[str],
    run_dir: Path | None,
    resume: Path | None,
    *,
    auto_resume: bool = False,
) -> int:
    """Run ``trinity pretrain``; returns the exit status.

    ``auto_resume`` continues the run in ``run_dir`` where there is one, with the overrides given,
    so that a launcher may always start the same command.
    """
    if auto_resume and run_dir is None:
        raise ConfigError("--auto-resume needs --run-dir, the directory to look for a run in")
    if auto_resume and run_dir is not None and (run_dir / CONFIG_FILE).exists():
        arguments = [argument for argument in arguments if "=" in argument]
        run_dir, resume = None, run_dir
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if resume is not None:
        if files or run_dir is not None:
            raise ConfigError(
                "--resume takes the configuration of the run itself; give overrides only, such as "
                "train.num_steps=500"
            )
        config, directory = read_run_config(resume, overrides), resume
    elif len(files) != 1:
        raise ConfigError(
            f"give one configuration file, got {files}; for instance configs/tiny.toml"
        )
    else:
        config, directory = load_any_config(files[0], overrides), run_dir
    with job.joined(config.train.device, timeout_s=config.parallel.timeout_s) as device:
        if resume is None:
            directory = job.from_first(directory or default_run_directory(config))
        assert directory is not None
        with held(directory) as lock:
            if resume is None and job.is_first():
                create_run_directory(directory, config)
            run = pretrain(config, directory, device, resume=resume is not None, lock=lock)
        if run.step < config.train.num_steps:
            return int(os.environ.get(STOPPED_STATUS_VARIABLE, SAVED_AND_STOPPED_EXIT_CODE))
        speaks = job.is_first()
    if speaks:  # the others need not wait for it
        _tell(run)
    return 0


def _tell(run: Run) -> None:
    """Summarize a run whose work is done, whether or not anything can be printed."""
    try:
        summarize(run)
        sys.stdout.flush()
    except OSError:  # what Python still holds would fail again, and change the exit status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def summarize(run: Run) -> None:
    """Print how validation moved, the balance of each layer, a sample, and where the run lies."""
    console = Console(highlight=False, soft_wrap=True)
    validations = read_metrics(run.directory, "validation")
    if validations:
        first, last = validations[0]["loss"], validations[-1]["loss"]
        console.print(
            f"validation loss {first:.4f} -> {last:.4f} ({(last - first) / first:+.1%})",
            markup=False,
        )
    max_vio = read_metrics(run.directory, "train")[-1]["max_vio"]
    shown = "  ".join(f"{value:.2f}" for value in max_vio)
    console.print(f"MaxVio per expert layer: {shown}", markup=False)
    model = run.model.whole_model
    if isinstance(model, LanguageModel) and run.config.train.sample_prompt:
        text = sample_text(run, model, SAMPLE_TOKENS)
        console.print(f"sample:\n{text}", markup=False)
    if run.config.model.is_image:
        console.print(_samples(run), markup=False)
    console.print(f"run: {run.directory}", markup=False)


def _samples(run: Run) -> str:
    """Where the samples are; or why there are none, which does not undo the run."""
    try:
        return f"samples: {sample_grid(run)}"
    except TrinityError as error:
        return f"no samples: {error}"
    except torch.OutOfMemoryError:
        return "no samples: the whole model finds no room here; draw them with sample-images"


def replay_command(directory: Path) -> int:
    """Run ``trinity replay``: the step after the newest checkpoint, again and again; exit status.

    Every rank of a job may call it, laid out as the run is. Nothing is trained or written.
    """
    config = read_run_config(directory, [])
    joined = job.joined(config.train.device, timeout_s=config.parallel.timeout_s)
    with joined as device, held(directory):
        run = open_run(config, directory, device, resume=True)
        found = replay_next_step(run)
        found_copies = replica_mismatches(run.model)
    if job.is_first():
        console = Console(highlight=False, soft_wrap=True)
        for line in (*found.lines, *found_copies):
            console.print(line, markup=False)
        if not found.lines and not found_copies:
            console.print(f"step {run.step + 1}: the same each time; all copies agree")
    return TrainingError.exit_code if found.lines or found_copies else 0


def skip_rows_command(directory: Path, first_step: int, last_step: int, reason: str) -> None:
    """Run ``trinity data skip``: keep a run from ever training on the rows of some steps again."""
    if last_step < first_step:
        raise ConfigError(f"steps {first_step}..{last_step}: the last comes before the first")
    with held(directory):
        config, loader = loader_of(directory)
        first_row = rows_of_step(loader, config.batch, first_step)[0]
        last_row = rows_of_step(loader, config.batch, last_step)[-1]
        loader.skip_rows(first_row, last_row + 1)
        entry = Intervention(
            reason=reason, first_row=first_row, end_row=last_row + 1, from_step=last_step
        )
        add_intervention(directory, entry)
    Console(highlight=False, soft_wrap=True).print(
        f"rows {first_row}..{last_row} are never trained on from now on, as "
        f"{directory / INTERVENTIONS_FILE} says; resume from a checkpoint before step {first_step}",
        markup=False,
    )


def describe_data(config: RunConfig) -> None:
    """Build or find what a configuration trains on and print what it holds."""
    dataset = open_dataset(config)
    console = Console(highlight=False, soft_wrap=True)
    for record in dataset.record():
        console.print_json(data=record)
    console.print(f"fingerprint {dataset.fingerprint}", markup=False)


def show_step(run_dir: Path, step: int) -> None:
    """Print the documents and token ranges of every row that ``step`` trains on."""
    console = Console(highlight=False, soft_wrap=True)
    for line in documents_of_step(run_dir, step):
        console.print(line, markup=False)
