"""Pack the numbers of a real run, so that judge, watch and alarms can be run over them again.

    python -m tools.record_curves RUN_DIR curves.npz

Throughput is left out: it says how busy the machine was that day.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from trinity.core.instruments import instruments
from trinity.train.metrics import read_metrics

STEP_KEYS = ("loss", "grad_norm", "z", "balance_loss", "batch_het", "next_row")
"""Of the lines of steps; all else that is watched follows from these and the load."""
LEFT_OUT = {"straggler"}


def instrument_keys() -> list[str]:
    """Of the lines of instruments, what is watched."""
    rows = instruments().values()
    return [row.key for row in rows if row.record == "instruments" and row.name not in LEFT_OUT]


def pack(run_dir: Path, target: Path) -> None:
    """Write what the run's record holds. fp32 but for rows; loads as 16-bit counts."""
    steps = read_metrics(run_dir, "train")
    read, validations = (read_metrics(run_dir, kind) for kind in ("instruments", "validation"))
    arrays: dict[str, Any] = {
        key: np.array([row[key] for row in steps], dtype=np.float64 if key == "next_row" else "f4")
        for key in STEP_KEYS
    }
    arrays["load"] = np.array([row["load"] for row in steps], dtype=np.uint16)
    arrays["instruments"] = np.array(
        [[_number(row[key]) for key in instrument_keys()] for row in read], dtype="f4"
    )
    arrays["instrument_steps"] = np.array([row["step"] for row in read])
    arrays["validation"] = np.array([row["loss"] for row in validations], dtype="f4")
    arrays["validation_steps"] = np.array([row["step"] for row in validations])
    np.savez_compressed(target, **arrays)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main() -> None:
    """Pack the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    pack(arguments.run_dir, arguments.target)


if __name__ == "__main__":
    main()
