"""Everything that only a GPU can say, in under eight minutes: tests, then kernel benchmarks.

    python -m tools.gpu_check

Runs all tests marked `gpu`, in parallel where pytest-xdist is installed (most of their time is
compiling), then a step of FLUX.1-dev at each patch size where diffusers is installed
(``tools.bench.flux_shapes``), then the timings of ``tools.bench.kernels_gpu`` within what is left
of the time. Prints tables and writes ``tools/bench/results/h200.json`` with the date, the device,
versions and shapes. Exit status: 0 all well, 1 a test or a kernel failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench import flux_shapes
from tools.bench.kernels_gpu import require_gpu, run_benchmarks

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tools/bench/results/h200.json"
TOTAL_S = 450.0
TESTS_S = 240.0
SPARE_S = 20.0
"""Kept for the candidate that is being timed when the time is up, and for the gate's compiling."""


def run_tests(timeout_s: float) -> dict[str, Any]:
    """Outcome of all tests marked `gpu`: the summary line of pytest, its status, the time taken."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=5"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    start_s = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"stopped after {timeout_s:.0f} s", "took_s": timeout_s}
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    lines = done.stdout.strip().splitlines()
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else "no output",
        "took_s": round(time.monotonic() - start_s, 1),
    }


def flux_steps() -> dict[str, Any]:
    """Milliseconds of a step of FLUX.1-dev by patch size, or why there are none."""
    if importlib.util.find_spec("diffusers") is None:
        return {"left_out": "diffusers is not installed"}
    return flux_shapes.measure()


def timing_table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds by length, a line for each candidate, shape and direction."""
    lengths = sorted({row["num_tokens"] for row in rows})
    table = Table("kernel", "heads x d, e", "candidate", "direction", title="ms, one row, bf16")
    for num_tokens in lengths:
        table.add_column(f"{num_tokens // 1024}K", justify="right")
    lines: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        shape = f"{row['num_heads'] or row['num_keys']} x {row['d']}, {row['e']}"
        key = (row["kernel"], shape, row["candidate"], row["direction"])
        lines.setdefault(key, {})[row["num_tokens"]] = row["ms"]
    for key, times in lines.items():
        cells = (f"{times[n]:.2f}" if n in times else "" for n in lengths)
        table.add_row(*key, *cells)
    return table


def crossover_table(found: list[dict[str, Any]]) -> Table:
    """From which length one of ours is as fast as another candidate, forward + backward."""
    table = Table("kernel", "d", "ours", "as fast as", "from tokens", title="crossovers")
    for row in found:
        if row["direction"] == "forward + backward":
            tokens = "never" if row["tokens"] is None else f"{row['tokens']:,}"
            line = (row["kernel"], str(row["d"]), row["candidate"], row["overtakes"], tokens)
            table.add_row(*line)
    return table


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="tests and benchmarks that need a GPU")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    require_gpu()
    start_s = time.monotonic()
    tests = run_tests(TESTS_S)
    console = Console()
    console.print(f"tests: {tests['summary']}")
    flux = flux_steps()
    console.print("FLUX.1-dev's shapes, random weights:", flux)
    left_s = TOTAL_S - SPARE_S - (time.monotonic() - start_s)
    result = {**run_benchmarks(budget_s=left_s), "tests": tests, "flux": flux}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(timing_table(result["rows"]), crossover_table(result["crossovers"]))
    if result["left_out"]:
        console.print(f"left out for want of time: {len(result['left_out'])} timings")
    console.print(f"{time.monotonic() - start_s:.0f} s, written to {arguments.json}")
    return 0 if tests["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
