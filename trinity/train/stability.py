"""Judging a step before it is applied: is it finite, is it a spike, how far may its gradient go.

Everything stays on the device: the verdict is a tensor that the optimizers obey, and the host reads
it a step later. Statistics come from calm steps only and use medians, so that neither a NaN nor a
spike moves its own yardstick; and scatter is measured from one step to the next, so that the steep
descent at the start of a run hides none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.config import OptimConfig, StabilityConfig

LOSS_WINDOW = 128
"""Losses that say how much losses scatter."""
NORM_WINDOW = 128
"""Gradient norms that say how much they scatter."""
LEVEL_STEPS = 16
"""The last of them whose median is the level now."""
MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
LEAST_SPREAD = 1e-3
"""Of the median: a curve that hardly moves at all must not make a spike of its rounding."""
ZCLIP_MEMORY, ZCLIP_SCORE, ZCLIP_WARMUP = 0.97, 2.5, 25
"""Of ZClip (arXiv 2504.02507): factor of the running mean, score to clip at, steps to collect."""


class Verdict(NamedTuple):
    """What is to happen with a step; scalars on the device."""

    accept: Tensor
    """Whether parameters, optimizer state and balancing biases may move."""
    is_calm: Tensor
    """Whether loss and gradient norm are finite and the loss is no spike."""
    loss_score: Tensor
    """Distance of the loss from its recent level, in robust standard deviations."""
    norm_score: Tensor
    """The same of the logarithm of the gradient norm."""
    max_norm: Tensor
    """What the gradient's norm is to be clipped to; infinite for no limit."""


def robust_score(value: Tensor, history: Tensor, min_values: int) -> Tensor:
    """(value - level) / spread, given the values before, the last one last, NaN for none.

    The level is the median of the last 16; the spread is the median absolute deviation of the
    differences between neighbours, in units of a normal distribution's sigma. Zero while there are
    fewer than ``min_values``; NaN for a value that is not finite.
    """
    level, spread = _level_and_spread(history)
    enough = history.isfinite().sum() >= min_values
    return torch.where(enough, (value - level) / spread, 0.0) + value * 0.0


def zclip_limit(norm: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The norm to clip to (ZClip, arXiv 2504.02507), and the state after this step.

    With running mean m and deviation s of past (clipped) norms and z = (norm - m) / s: beyond
    z = 2.5 the limit is m + s * 2.5^2 / z, so that the worse the spike the less is left of it.

    Args:
        norm: of the gradient before clipping.
        state: (steps seen, mean, variance); zeros at the start. The first 25 steps only collect.
    """
    count, mean, variance = state.unbind()
    deviation = variance.clamp(min=0.0).sqrt() + 1e-6
    score = (norm - mean) / deviation
    is_warm = count >= ZCLIP_WARMUP
    limit = mean + deviation * ZCLIP_SCORE**2 / score
    limit = torch.where(is_warm & (score > ZCLIP_SCORE), limit, float("inf"))
    kept = torch.minimum(norm, limit)
    # Plain averages while collecting, exponential ones after.
    share = torch.where(is_warm, 1.0 - ZCLIP_MEMORY, 1.0 / (count + 1.0))
    moved = mean + share * (kept - mean)
    spread = torch.where(
        is_warm,
        ZCLIP_MEMORY * variance + (1.0 - ZCLIP_MEMORY) * (kept - moved).square(),
        variance + share * ((kept - mean) * (kept - moved) - variance),
    )
    return limit, torch.stack((count + 1.0, moved, spread))


class Judge:
    """Judges steps one after the other; its memory is part of the checkpoint."""

    def __init__(
        self, stability: StabilityConfig, optim: OptimConfig, device: torch.device | str = "cpu"
    ) -> None:
        self._stability, self._optim = stability, optim
        empty = torch.full((LOSS_WINDOW + NORM_WINDOW,), float("nan"), dtype=torch.float64)
        self._losses, self._log_norms = empty.to(device).split([LOSS_WINDOW, NORM_WINDOW])
        self._zclip = torch.zeros(3, dtype=torch.float64, device=device)

    def verdict(self, loss: Tensor, grad_norm: Tensor) -> Verdict:
        """The verdict on a step, from scalars that are the same on every rank; remembers them."""
        loss, grad_norm = loss.detach().double(), grad_norm.detach().double()
        config = self._stability
        is_finite = loss.isfinite() & grad_norm.isfinite()
        loss_score = robust_score(loss, self._losses, config.min_steps)
        log_norm = grad_norm.clamp(min=1e-30).log()
        norm_score = robust_score(log_norm, self._log_norms, config.min_steps)
        is_calm = is_finite & (loss_score <= config.loss_threshold)
        accept = is_calm if config.skip_spikes else is_finite
        max_norm = torch.full_like(loss, self._optim.grad_clip or float("inf"))
        if self._optim.clip_rule == "zclip":
            limit, state = zclip_limit(grad_norm, self._zclip)
            max_norm = torch.minimum(max_norm, limit)
            self._zclip.copy_(torch.where(accept, state, self._zclip))
        # A spike that was applied all the same counts as the tamest spike: if it was the first of a
        # new level of the loss, more of them move the median there.
        level, spread = _level_and_spread(self._losses)
        tame = torch.where(is_calm, loss, level + config.loss_threshold * spread)
        _append(self._losses, tame, accept)
        _append(self._log_norms, log_norm, is_calm)
        return Verdict(accept, is_calm, loss_score, norm_score, max_norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Its memory, to be saved and loaded in place."""
        return {"losses": self._losses, "log_norms": self._log_norms, "zclip": self._zclip}


def _level_and_spread(history: Tensor) -> tuple[Tensor, Tensor]:
    # Along a dim: without one, a GPU's median asks the host which element it is.
    level = history[-LEVEL_STEPS:].nanmedian(0).values
    moves = history.diff()
    deviation = (moves - moves.nanmedian(0).values).abs().nanmedian(0).values / 2**0.5
    return level, MAD_TO_SIGMA * deviation + LEAST_SPREAD * level.abs() + 1e-12


def _append(history: Tensor, value: Tensor, keep: Tensor) -> None:
    """Push ``value`` in at the end where ``keep`` holds; in place."""
    moved = torch.cat((history[1:], value.reshape(1)))
    history.copy_(torch.where(keep, moved, history))
