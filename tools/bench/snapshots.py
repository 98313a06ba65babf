"""What a snapshot for rewinding holds a run up, against a training step of the same run.

``configs/tiny.toml`` on its own data, a few steps with a snapshot after each. Wall time, the median
of the rounds, with the load of the machine beside it: nothing else must be running.

    python tools/bench/snapshots.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trinity.core.load_config import load_config
from trinity.train.rewind import SnapshotRing
from trinity.train.run import create_run_directory, open_run
from trinity.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "snapshots_cpu.json"


def measure(num_steps: int) -> dict[str, float]:
    """Seconds of a step and of a snapshot, bytes of a snapshot, and the share that it costs."""
    config = load_config(ROOT / "configs/tiny.toml", ["rewind.enabled=true"])
    with tempfile.TemporaryDirectory() as directory:
        create_run_directory(Path(directory), config)
        run = open_run(config, Path(directory), torch.device("cpu"), resume=False)
    ring = SnapshotRing(config.rewind.model_copy(update={"snapshot_every_steps": 1}))
    steps_s, snapshots_s = [], []
    for _ in range(num_steps):
        start_s = time.perf_counter()
        pending = train_step(run.model, run.optimizers, run.next_microbatches(), config)
        pending.result()
        run.advance(pending.num_tokens)
        middle_s = time.perf_counter()
        assert ring.take_if_due(run)
        steps_s.append(middle_s - start_s)
        snapshots_s.append(time.perf_counter() - middle_s)
    # The first rounds allocate the memory that later ones use again.
    step_s, snapshot_s = (
        statistics.median(x[config.rewind.num_snapshots :]) for x in (steps_s, snapshots_s)
    )
    return {
        "step_s": step_s,
        "snapshot_s": snapshot_s,
        "snapshot_bytes": ring.num_bytes / len(ring.snapshots),
        "every_steps": config.rewind.snapshot_every_steps,
        "share": snapshot_s / (step_s * config.rewind.snapshot_every_steps),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.steps)
    table = Table(title="snapshots, configs/tiny.toml, 1 thread")
    for heading in ("step ms", "snapshot ms", "MiB each", "every", "of training time"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{result['step_s'] * 1e3:.0f}",
        f"{result['snapshot_s'] * 1e3:.0f}",
        f"{result['snapshot_bytes'] / 2**20:.0f}",
        f"{result['every_steps']:.0f}",
        f"{result['share']:.3%}",
    )
    Console().print(table)
    if arguments.save:
        result |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
