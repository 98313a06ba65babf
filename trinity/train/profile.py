"""Tracing a few steps with the PyTorch profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

WARMUP_STEPS = 2
"""Steps that pass before tracing starts: the first ones allocate and compile."""


class StepProfiler(Protocol):
    """Told after every step; writes its trace by itself."""

    def step(self) -> None:
        """Mark the end of a training step."""
        ...


class _NoProfiler:
    def step(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def step_profiler(run_dir: Path, num_steps: int) -> Iterator[StepProfiler]:
    """Trace ``num_steps`` steps into ``run_dir/profile/trace.json`` (open it in Perfetto)."""
    if num_steps == 0:
        yield _NoProfiler()
        return
    trace = run_dir / "profile" / "trace.json"
    trace.parent.mkdir(exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=WARMUP_STEPS - 1, warmup=1, active=num_steps, repeat=1
        ),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
        record_shapes=True,
    ) as profiler:
        yield profiler
