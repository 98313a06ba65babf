"""Which part of a linear-time mixer is worth what: the build-up table of 2Mamba, at small scale.

Trains small language models that differ in their mixers only: equal parameters, data, steps and
optimizer settings, several seeds. The rows are in :mod:`tools.ablation_rows`, the tables and the
plot in :mod:`tools.ablation_report`, what came out in ``docs/ablation.md``.

    python -m tools.ablation --save            # about an hour on two cores
    python -m tools.ablation --tables          # what is saved, without training
    python -m tools.ablation --only ratio --ratio-seeds 3

A finished run is saved at once; the same command continues where it was stopped. First the learning
rate is chosen, once for all rows: on seed 1, one row of each family tries every factor of
``FACTORS``, and the factor with the lowest mean held-out loss is taken.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.ablation_report import DOCUMENT, plot, show, write_document
from tools.ablation_rows import (
    BUILD_UP,
    CONFIG,
    RATIO,
    TABLES,
    TUNED,
    num_parameters,
    row_config,
    row_of,
    settings_hash,
)
from tools.ledger import ROOT
from tools.plan_memory import MMAP_THRESHOLD, TRIM_THRESHOLD
from trinity.core.config import Config
from trinity.core.errors import TrainingError
from trinity.core.load_config import load_config
from trinity.data.build import build_dataset
from trinity.train.evaluate import validation_loss
from trinity.train.run import create_run_directory, open_run
from trinity.train.step import train_step

RESULTS = ROOT / "tools/bench/results/ablation.json"
FACTORS = (1.0, 2.0, 4.0)
"""On the learning rates of ``configs/ablation.toml``."""
TUNING_SEED = 1
TRAIN_LOSS_STEPS = 20
"""The training loss that is reported is the mean of the last so many steps."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
LARGEST_BLOCK_BYTES, KEPT_BYTES = 32 << 20, 1 << 30
"""The largest that malloc takes from what it kept, and how much it keeps."""


class Job(NamedTuple):
    """One training run."""

    table: str
    row: str
    seed: int
    lr_factor: float

    @property
    def key(self) -> str:
        """Its name in the saved file."""
        return f"{self.table}/{self.row}/lr{self.lr_factor:g}/seed{self.seed}"


class Study:
    """What is saved, and what is still to be trained.

    ``path`` is the file of finished runs; ``overrides`` are settings that all runs share.
    """

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()) -> None:
        self.path, self.overrides = path, overrides
        self.saved: dict[str, Any] = {"runs": {}}
        if path.exists():
            self.saved = json.loads(path.read_text(encoding="utf-8"))

    def config(self, job: Job) -> Config:
        """The configuration of a run."""
        row = row_of(job.table, job.row)
        return row_config(
            job.table, row, seed=job.seed, lr_factor=job.lr_factor, overrides=self.overrides
        )

    def settings(self, job: Job) -> str:
        """A hash that changes with the settings of a run."""
        return settings_hash(self.config(job), row_of(job.table, job.row), self.overrides)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that were never trained, or with other settings."""
        runs = self.saved["runs"]
        return [
            job
            for job in dict.fromkeys(jobs)
            if runs.get(job.key, {}).get("settings") != self.settings(job)
        ]

    def keep(self, job: Job, outcome: dict[str, Any]) -> None:
        """Save a finished run, in one move of a file."""
        self.saved["runs"][job.key] = {**job._asdict(), "settings": self.settings(job), **outcome}
        self.write()

    def write(self) -> None:
        """Write everything. A reader sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.saved, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

    def describe(self) -> None:
        """Record what all runs have in common."""
        config = load_config(CONFIG, self.overrides)
        self.saved["common"] = {
            "config": str(CONFIG.relative_to(ROOT)),
            "num_steps": config.train.num_steps,
            "tokens_per_step": config.batch.rows_per_step * config.batch.sequence_length,
            "sequence_length": config.batch.sequence_length,
            "muon_lr": config.optim.muon.lr,
            "adamw_lr": config.optim.adamw.lr,
            "precision": config.train.precision,
            "torch": torch.__version__,
        }

    def best_factor(self, factors: Sequence[float], tuned: Sequence[str]) -> float:
        """The factor with the lowest mean loss over the families; diverged runs rule it out."""

        def mean_loss(factor: float) -> float:
            keys = [Job(BUILD_UP, row, TUNING_SEED, factor).key for row in tuned]
            losses = [self.saved["runs"][key]["held_out"] for key in keys]
            return math.inf if None in losses else sum(losses) / len(losses)

        return min(factors, key=mean_loss)


def train(config: Config) -> dict[str, Any]:
    """Train one model and evaluate it; losses in nats per token, None if the run diverged."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    losses: list[float] = []
    held_out: float | None = None
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        create_run_directory(directory, config)
        run = open_run(config, directory, torch.device("cpu"), resume=False)
        try:
            for _ in range(config.train.num_steps):
                pending = train_step(run.model, run.optimizers, run.next_microbatches(), config)
                result = pending.result()
                run.advance(result.num_tokens)
                losses.append(result.loss)
            (batches,) = run.validation.values()
            held_out = validation_loss(run.model, batches)
        except TrainingError as error:
            print(error, flush=True)
    last = losses[-TRAIN_LOSS_STEPS:]
    return {
        "held_out": held_out,
        "train": sum(last) / max(len(last), 1),
        "intermediate_size": config.model.intermediate_size,
        "cpu_s": round(time.process_time() - start_cpu_s, 1),
        "wall_s": round(time.perf_counter() - start_s, 1),
    }


def train_all(study: Study, jobs: Iterable[Job], num_workers: int) -> None:
    """Train what is missing, ``num_workers`` runs at a time with one thread each."""
    missing = study.missing(jobs)
    if not missing:
        return
    config = study.config(missing[0])
    # Before the first run, or runs side by side would each tokenize the corpus.
    build_dataset(config.data, config.seed, config.model.vocab_size)
    context = multiprocessing.get_context("fork")
    start_s = time.perf_counter()
    with ProcessPoolExecutor(num_workers, context, _enter_worker) as pool:
        running = {pool.submit(train, study.config(job)): job for job in missing}
        for number, future in enumerate(as_completed(running), start=1):
            job, outcome = running[future], future.result()
            row = row_of(job.table, job.row)
            outcome["parameters"] = num_parameters(
                row, outcome["intermediate_size"], study.overrides
            )
            study.keep(job, outcome)
            left_s = (time.perf_counter() - start_s) / number * (len(missing) - number)
            loss = "diverged" if outcome["held_out"] is None else f"{outcome['held_out']:.4f}"
            print(
                f"{job.key:<44} held-out {loss}  {outcome['cpu_s']:.0f} s CPU, "
                f"{outcome['wall_s']:.0f} s; {number}/{len(missing)}, {left_s / 60:.0f} min left",
                flush=True,
            )


def _enter_worker() -> None:
    """One thread; no worker outlives a killed command; and freed memory is kept for reuse."""
    libc = ctypes.CDLL(None)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    # Or a fifth of the time goes into giving the same pages back and getting them again.
    libc.mallopt(MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
    libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose the learning rate, train what is missing, print the tables."""
    options = _parse(arguments)
    study = Study(options.results, tuple(options.set))
    if not options.tables:
        study.describe()
        factor = _choose_factor(study, options)
        study.saved["common"]["lr_factor"] = factor
        study.write()
        train_all(study, _jobs(options, factor), options.workers)
    show(study.saved)
    if options.save:
        plot(study.saved, options.results.with_suffix(".png"))
        write_document(study.saved, options.document)
    return 0


def _choose_factor(study: Study, options: argparse.Namespace) -> float:
    """One factor for all rows; with a single one there is nothing to train."""
    factors = options.factors
    if len(factors) > 1:
        tuned = [row for row in TUNED if not options.rows or row in options.rows] or TUNED
        tuning = [Job(BUILD_UP, row, TUNING_SEED, f) for f in factors for row in tuned]
        train_all(study, tuning, options.workers)
        return study.best_factor(factors, tuned)
    return factors[0]


def _jobs(options: argparse.Namespace, factor: float) -> list[Job]:
    """Seed by seed, so that a command that is stopped leaves whole tables with fewer seeds."""
    seeds = {BUILD_UP: options.seeds, RATIO: options.ratio_seeds}
    return [
        Job(table, row.key, seed, factor)
        for seed in range(1, max(seeds.values()) + 1)
        for table in options.only
        for row in TABLES[table]
        if seed <= seeds[table] and (not options.rows or row.key in options.rows)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    keys = [row.key for rows in TABLES.values() for row in rows]
    parser.add_argument("--rows", nargs="+", choices=keys, metavar="ROW", help=", ".join(keys))
    parser.add_argument("--seeds", type=int, default=3, help="of the build-up")
    parser.add_argument("--ratio-seeds", type=int, default=2)
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of all runs")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where runs are kept")
    parser.add_argument("--save", action="store_true", help="write the plot and the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
