"""Schedules as pure functions of the step: learning-rate factor, batch-size ramp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol


class RampPoint(Protocol):
    """From ``from_step`` on, a step holds ``rows_per_step`` rows."""

    @property
    def from_step(self) -> int:
        """First step (counted from 0) the point applies to."""
        ...

    @property
    def rows_per_step(self) -> int:
        """Rows of the global batch."""
        ...


def lr_factor(
    step: int,
    *,
    shape: str,
    warmup_steps: int,
    num_steps: int,
    decay_steps: int,
    final_fraction: float,
    decay_shape: str,
) -> float:
    """Factor on the peak learning rates for optimizer step ``step``, counted from 0.

    Warm-up is linear from 1/warmup_steps at step 0 to 1 at step warmup_steps - 1. Then
    ``constant`` stays at 1; ``linear`` and ``cosine`` fall to ``final_fraction`` over the rest of
    the run; ``wsd`` stays at 1 and falls in the shape ``decay_shape`` over the last
    ``decay_steps``. The last step has exactly ``final_fraction``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if shape == "constant":
        return 1.0
    if shape == "wsd":
        num_decay_steps, curve = decay_steps, decay_shape
    else:
        num_decay_steps, curve = num_steps - warmup_steps, shape
    progress_steps = step + 1 - (num_steps - num_decay_steps)
    if progress_steps <= 0 or num_decay_steps == 0:
        return 1.0
    progress = min(progress_steps / num_decay_steps, 1.0)
    fall = progress if curve == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - final_fraction) * fall


def rows_at_step(step: int, rows_per_step: int, ramp: Sequence[RampPoint]) -> int:
    """Rows of the global batch at ``step``: the last ramp point reached, else the base."""
    reached = [point.rows_per_step for point in ramp if point.from_step <= step]
    return reached[-1] if reached else rows_per_step


def rows_before_step(step: int, rows_per_step: int, ramp: Sequence[RampPoint]) -> int:
    """Rows consumed by all steps before ``step``."""
    edges = [0, *(min(point.from_step, step) for point in ramp), step]
    rates = [rows_per_step, *(point.rows_per_step for point in ramp)]
    spans = zip(pairwise(edges), rates, strict=True)
    return sum((end - start) * rate for (start, end), rate in spans)
