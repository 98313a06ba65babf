"""What the host concludes from the numbers of one step after the other."""

from __future__ import annotations

import base64
import math
import statistics
from collections import deque
from typing import Any

import torch
from torch import Tensor

from trinity.core.config import RunConfig
from trinity.models.backbone import load_shape
from trinity.nn.balance import load_entropy, max_violation
from trinity.train.probe_noise import most_information, range_information, range_violation
from trinity.train.stability import MAD_TO_SIGMA
from trinity.train.step import StepResult

BLOCK_STEPS = 32
"""Losses whose median stands for where the run is now."""
CALM_STEPS = 128
"""Calm losses that say how much losses scatter."""
DRIFT_SPREADS, DRIFT_SHARE = 2.0, 0.02
"""The loss has turned when its block is above the best by so many spreads, and by such a share."""
SKIPS_AMONG = 100
"""Steps among which skipped ones are counted."""
DEAD_STEPS = 20
"""Steps without a token that make an expert a dead one."""
SLOPE_STEPS = (100.0, 1000.0)
"""Memories of the two running means whose difference is the slope of MaxVio."""
NOISE_STEPS = 100.0
"""Memory of the loads by noise level: one step has too few images to fill every level evenly."""


class Watch:
    """Numbers that need more than one step to be known.

    Every rank keeps one and feeds it the same numbers, so all draw the same conclusions. Its state
    is part of the checkpoint.
    """

    def __init__(self, config: RunConfig) -> None:
        self._rewind = config.rewind
        model = config.model
        self._num_chosen = model.num_experts_per_tok
        self._load_shape = (len(model.moe_layers), *load_shape(model))
        self._most_vio = model.num_experts / model.num_experts_per_tok - 1.0
        self._block: deque[float] = deque(maxlen=BLOCK_STEPS)
        self._calm: deque[float] = deque(maxlen=CALM_STEPS)
        self._best = math.inf
        self._vio_means: list[float] = []
        self._idle_LE: Tensor | None = None
        self._load_LUE: Tensor | None = None
        self.spikes: list[int] = []
        """Recent steps whose loss was a spike or not finite."""
        self.skipped: list[int] = []
        """Recent steps that were not applied."""

    def observe(self, step: int, result: StepResult) -> dict[str, Any]:
        """Take the numbers of ``step``; returns those that follow from it and its past."""
        oldest = step - max(SKIPS_AMONG, self._rewind.window_steps)
        self.spikes = [s for s in self.spikes if oldest < s < step]
        self.skipped = [s for s in self.skipped if oldest < s < step]
        if not result.is_calm:
            self.spikes.append(step)
        if not result.accepted:
            self.skipped.append(step)
        return {
            "loss_score": result.loss_score,
            "grad_score": result.grad_score,
            "loss_drift": self._drift(result),
            "num_skipped": sum(s > step - SKIPS_AMONG for s in self.skipped),
            **self._balance(result.load_LE.float()),
            **self._noise(result.load_LUE),
        }

    def rewind_reason(self, step: int, values: dict[str, Any]) -> str | None:
        """Why the run should go back, if it should."""
        config = self._rewind
        recent = [s for s in self.spikes if s > step - config.window_steps]
        if len(recent) > config.spikes:
            return f"{len(recent)} spikes among {config.window_steps} steps"
        if values["loss_drift"] > 1.0:
            return f"the loss drifts away from its best level, {self._best:.4f}"
        return None

    def first_spike(self, step: int) -> int:
        """Where the trouble began: the first recent spike, or where the drifting block starts."""
        recent = [s for s in self.spikes if s > step - self._rewind.window_steps]
        return min(recent, default=max(1, step - BLOCK_STEPS + 1))

    def num_skipped_in_a_row(self, step: int) -> int:
        """Steps up to ``step``, this one included, of which none was applied."""
        skipped, number = set(self.skipped), 0
        while step - number in skipped:
            number += 1
        return number

    def state(self) -> dict[str, Any]:
        """Everything but the idle experts, as JSON."""
        load = self._load_LUE
        return {
            "block": list(self._block),
            "calm": list(self._calm),
            "best": None if math.isinf(self._best) else self._best,
            "vio_means": self._vio_means,
            "spikes": self.spikes,
            "skipped": self.skipped,
            "load_by_sigma": None if load is None else _packed(load),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self._block = deque(state["block"], maxlen=BLOCK_STEPS)
        self._calm = deque(state["calm"], maxlen=CALM_STEPS)
        self._best = math.inf if state["best"] is None else state["best"]
        self._vio_means = list(state["vio_means"])
        self.spikes, self.skipped = list(state["spikes"]), list(state["skipped"])
        self._idle_LE = None
        packed = state.get("load_by_sigma")
        self._load_LUE = None if packed is None else _unpacked(packed, self._load_shape)

    def _drift(self, result: StepResult) -> float:
        """How far the loss has risen from its best level; 1 and more is a divergence."""
        if math.isfinite(result.loss):
            self._block.append(result.loss)
        if result.is_calm:
            self._calm.append(result.loss)
        if len(self._block) < BLOCK_STEPS or len(self._calm) < 2 * BLOCK_STEPS:
            return 0.0
        level, middle = statistics.median(self._block), statistics.median(self._calm)
        spread = MAD_TO_SIGMA * statistics.median(abs(loss - middle) for loss in self._calm)
        self._best = min(self._best, level)
        allowed = max(DRIFT_SPREADS * spread, DRIFT_SHARE * abs(self._best))
        return (level - self._best) / allowed if allowed else 0.0

    def _balance(self, load_LE: Tensor) -> dict[str, float]:
        if not len(load_LE):
            return {}
        worst = float(max_violation(load_LE).max())
        share = worst / self._most_vio if self._most_vio else 0.0
        if not self._vio_means:
            self._vio_means = [share, share]
        self._vio_means = [
            mean + (share - mean) / steps
            for mean, steps in zip(self._vio_means, SLOPE_STEPS, strict=True)
        ]
        fast, slow = self._vio_means
        idle_LE = torch.zeros_like(load_LE) if self._idle_LE is None else self._idle_LE
        self._idle_LE = (idle_LE + 1) * (load_LE == 0)
        return {
            "max_vio_share": share,
            "max_vio_slope": (fast - slow) * 1000.0 / (SLOPE_STEPS[1] - SLOPE_STEPS[0]),
            "load_entropy": float(load_entropy(load_LE).min()),
            "dead_experts": int((self._idle_LE >= DEAD_STEPS).sum()),
        }

    def _noise(self, load_LUE: Tensor | None) -> dict[str, Any]:
        """How far experts have specialised by noise level, of images; of about the last
        ``NOISE_STEPS`` steps."""
        if load_LUE is None or not len(load_LUE):
            return {}
        kept = 0.0 if self._load_LUE is None else self._load_LUE * (1 - 1 / NOISE_STEPS)
        self._load_LUE = load = load_LUE.double() + kept
        worst = float(range_violation(load).max())
        information_L = range_information(load)
        tiny = torch.finfo(load.dtype).tiny
        share_L = information_L / most_information(load, self._num_chosen).clamp(min=tiny)
        return {
            "sigma_max_vio": worst,
            "sigma_vio_share": worst / self._most_vio if self._most_vio else 0.0,
            "sigma_information": float(information_L.max()),
            "sigma_information_share": float(share_L.max()),
            "sigma_information_layers": information_L.tolist(),
        }


def _packed(x: Tensor) -> str:
    """fp64 numbers as text, many times shorter than a list of them, and exact."""
    return base64.b64encode(x.numpy().tobytes()).decode("ascii")


def _unpacked(text: str, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64).view(shape)
