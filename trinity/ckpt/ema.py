"""An exponential moving average of a model's weights, sharded as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from trinity.core.config import EmaConfig
from trinity.core.sharding import local_tensor


class WeightAverage:
    """Follows the weights of a model: average += (1 - decay) (weights - average) at every step.

    Buffers that are not whole numbers are averaged too. With ``warmup`` the decay of step n,
    counted from 1, is at most (1 + n) / (10 + n), so that a short run forgets where it began.
    """

    def __init__(self, weights: dict[str, Tensor], config: EmaConfig) -> None:
        """``weights``: parameters and buffers by name, as they are now; they are not copied but
        followed."""
        self.config = config
        live = {name: w for name, w in weights.items() if w.is_floating_point()}
        self.tensors = {name: w.detach().clone() for name, w in live.items()}
        """The average, by the same names."""
        self._live = [local_tensor(w.detach()) for w in live.values()]
        self._average = [local_tensor(w) for w in self.tensors.values()]

    def decay(self, step: int) -> float:
        """Share of the average that step ``step``, counted from 1, keeps."""
        early = (1 + step) / (10 + step)
        return min(self.config.decay, early) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int, accept: Tensor | None = None) -> None:
        """Take in the weights after step ``step``, unless ``accept``, a boolean scalar, is false.

        On a GPU nobody waits for ``accept``; that takes memory for another copy, for a moment.
        """
        if accept is not None and accept.is_cpu:
            if not accept:
                return
            accept = None
        weight = 1 - self.decay(step)
        if accept is None:
            torch._foreach_lerp_(self._average, self._live, weight)
            return
        moves = torch._foreach_sub(self._live, self._average)
        torch._foreach_mul_(moves, accept.float() * weight)
        torch._foreach_add_(self._average, moves)
