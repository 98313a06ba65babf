"""What the instruments cost: measured steps against plain ones, taking turns in one process.

The model and the batch of ``configs/tiny.toml`` on random tokens. CPU time of the process, which
other work on the machine hardly disturbs; medians over the rounds. The overhead is what a measured
step costs more, spread over the steps from one reading to the next.

    python tools/bench/instruments.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trinity.core.batch import Batch
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.optim.groups import build_optimizers
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts
from trinity.train.corruption import replay_mismatches
from trinity.train.probes import Probes, values
from trinity.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "instruments_cpu.json"
PARTS = ("before_update", "after_update", "reading", "values")


class Stopwatch:
    """CPU milliseconds of named calls."""

    def __init__(self) -> None:
        self.cpu_ms: dict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls are timed."""

        def call(*args: Any, **options: Any) -> Any:
            start_s = time.process_time()
            result = function(*args, **options)
            self.cpu_ms[name].append((time.process_time() - start_s) * 1e3)
            return result

        return call


def random_batch(config: Config, generator: torch.Generator) -> list[Batch]:
    """The microbatches of a step; every token is predicted."""
    rows, length = config.batch.rows_per_step, config.batch.sequence_length
    size = (rows, length + 1)
    row_BS = torch.randint(0, config.model.vocab_size, size, generator=generator)
    ids_BS = (torch.arange(length) * 3 // length).to(torch.int32).expand(rows, length)
    whole = Batch(row_BS[:, :-1].contiguous(), row_BS[:, 1:].contiguous(), ids_BS.contiguous())
    count = config.batch.microbatch_rows
    return [Batch(*(field[i : i + count] for field in whole)) for i in range(0, rows, count)]


def race(config: Config, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of every step and of every part, in each round."""
    model = ParallelModel.build(config, None, torch.device("cpu"))
    optimizers = build_optimizers(model.named_parameters(), config.optim)
    generator = torch.Generator().manual_seed(0)
    probes, watch = Probes(model, optimizers), Stopwatch()
    read = watch.timed("values", values)
    for name in PARTS[:-1]:
        setattr(probes, name, watch.timed(name, getattr(probes, name)))

    def plain() -> None:
        train_step(model, optimizers, random_batch(config, generator), config).result()

    def measured() -> None:
        batch = random_batch(config, generator)
        pending = train_step(model, optimizers, batch, config, probes=probes)
        pending.result()
        read(pending.reading)

    for _ in range(rounds + 1):
        watch.timed("plain step", plain)()
        watch.timed("measured step", measured)()
    batch = random_batch(config, generator)
    counts = StepCounts(config.batch.rows_per_step * config.batch.sequence_length, len(batch))
    for _ in range(2):
        optimizers.zero_grad()
        model.pipeline.forward_backward(batch, counts)
        watch.timed("replay of a step", replay_mismatches)(model, batch, counts)
        for stage in model.stages:
            stage.take_losses()
    return {name: times[1:] for name, times in watch.cpu_ms.items()}


def main() -> None:
    """Print the table; with --save also write the numbers."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"keep the numbers in {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(ROOT / "configs/tiny.toml", [])
    every = config.log.instruments_every_steps
    times = race(config, arguments.rounds)
    medians = {name: statistics.median(cpu_ms) for name, cpu_ms in times.items()}
    pairs = zip(times["measured step"], times["plain step"], strict=True)
    extra_ms = statistics.median(measured - plain for measured, plain in pairs)
    inside_ms = extra_ms - sum(medians[name] for name in PARTS)
    rows = {
        "plain step": medians["plain step"],
        "measured step": medians["measured step"],
        "more, median of pairs": extra_ms,
        "- hooks in the forward": inside_ms,
        **{f"- {name}": medians[name] for name in PARTS},
        "replay of a step": medians["replay of a step"],
    }
    overhead = extra_ms / medians["plain step"] / every
    table = Table(title=f"every {every} steps: {overhead:.2%}")
    table.add_column("")
    table.add_column("CPU ms", justify="right")
    for name, cpu_ms in rows.items():
        table.add_row(name, f"{cpu_ms:,.1f}")
    Console(width=100).print(table)
    if arguments.save:
        record = {
            "benchmark": "instruments",
            "config": "configs/tiny.toml",
            "precision": config.train.precision,
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            "every_steps": every,
            "overhead": round(overhead, 5),
            "cpu_ms": {name: round(cpu_ms, 2) for name, cpu_ms in rows.items()},
        }
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
