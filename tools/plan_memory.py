"""Hold the memory that ``trinity plan`` predicts against real training steps on this machine.

    python -m tools.plan_memory          # three runs of a gigabyte or two, about a minute

Each run is a forked process, or two, that takes steps and reads its peak resident memory. Measured
is what building and training added to the process; predicted is the plan's total without what a GPU
keeps for itself.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tools.ledger import ROOT, axes_as_overrides
from tools.ranks import on_ranks
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.data.build import build_dataset
from trinity.parallel.mesh import layout_for
from trinity.plan.case import Case
from trinity.plan.hardware import load_efficiency
from trinity.plan.memory import Memory, peak_memory
from trinity.plan.shapes import model_shape
from trinity.train.run import create_run_directory, open_run
from trinity.train.step import train_step

RESULTS = ROOT / "tools/bench/results/plan_memory.json"
NUM_STEPS = 2
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)

MODEL = [
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=4",
    "model.head_dim=64",
    "model.sliding_window=128",
    "model.vocab_size=8192",
    "model.intermediate_size=1536",
    "model.num_experts_per_tok=2",
    "batch.sequence_length=512",
]
"""Large enough for a rank to hold a gigabyte, small enough for a step of seconds."""
RUNS: dict[str, tuple[dict[str, object], list[str]]] = {
    "parameters weigh most": (
        {},
        [
            *MODEL,
            "model.num_experts=32",
            "model.moe_intermediate_size=512",
            "batch.rows_per_step=2",
            "batch.microbatch_rows=1",
        ],
    ),
    "activations weigh most": (
        {},
        [
            *MODEL,
            "model.num_hidden_layers=8",
            "model.num_experts=8",
            "model.moe_intermediate_size=256",
            "batch.rows_per_step=8",
            "batch.microbatch_rows=8",
        ],
    ),
    "fsdp2 x ep2, full recompute": (
        {"dp_shard": 2, "ep": 2},
        [
            *MODEL,
            "model.num_experts=32",
            "model.moe_intermediate_size=512",
            "batch.rows_per_step=8",
            "batch.microbatch_rows=4",
            "train.recompute=full",
        ],
    ),
}


class Result(NamedTuple):
    """Bytes of the fullest rank."""

    measured: int
    predicted: int
    parts: Memory

    @property
    def error(self) -> float:
        """Predicted against measured; positive is too much."""
        return self.predicted / self.measured - 1


def compare(name: str, scratch: Path) -> Result:
    """Train and predict one of ``RUNS``."""
    axes, overrides = RUNS[name]
    config = load_config(
        ROOT / "configs/ledger.toml",
        [
            *overrides,
            *axes_as_overrides(axes),
            "train.precision=bf16",
            "loss.chunk_rows=256",
            f"data.cache_dir={scratch / 'cache'}",
        ],
    )
    build_dataset(config.data, config.seed, config.model.vocab_size)
    directory = scratch / name.replace(" ", "-").replace(",", "")
    create_run_directory(directory, config)
    size = int(str(axes.get("dp_shard", 1)))
    measured = max(on_ranks(size, _peak_growth, config, directory, timeout_s=400))
    layout = layout_for(config.parallel, size)
    case = Case(config, model_shape(config.model, config.optim), layout)
    parts = peak_memory(case, load_efficiency())
    return Result(measured, parts.total - parts.runtime, parts)


def _peak_growth(config: Config, directory: Path) -> int:
    """Bytes by which the peak of this process rises over what it had when it started."""
    libc = ctypes.CDLL(None)
    # Give freed tensors back at once: what is wanted is what is in use, not what malloc keeps.
    libc.mallopt(MMAP_THRESHOLD, 64 << 10)
    libc.mallopt(TRIM_THRESHOLD, 64 << 10)
    _step_of_a_small_model()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run = open_run(config, directory, torch.device("cpu"), resume=False)
    for _ in range(NUM_STEPS):
        pending = train_step(run.model, run.optimizers, run.next_microbatches(), config)
        result = pending.result()
        run.advance(result.num_tokens)
    return _peak_resident() - before


def _step_of_a_small_model() -> None:
    """Load what libraries load on first use."""
    layer = torch.nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.ones(64, 64)).sum().backward()


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; this needs Linux")


def main() -> None:
    """Print predicted beside measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"keep the numbers in {RESULTS.name}")
    options = parser.parse_args()
    rows = {}
    print("| run | measured MiB | predicted MiB | error |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for name in RUNS:
            result = compare(name, Path(scratch))
            mib = (result.measured / 2**20, result.predicted / 2**20)
            rows[name] = {"measured_mib": mib[0], "predicted_mib": mib[1], "error": result.error}
            print(f"| {name} | {mib[0]:,.0f} | {mib[1]:,.0f} | {result.error:+.1%} |", flush=True)
            parts = {k: round(v / 2**20) for k, v in result.parts._asdict().items() if v}
            print(f"    {parts}")
    if options.save:
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
