"""The global gradient norm, for gradients of which each rank holds parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trinity.core.sharding import local_tensor, num_copies


@torch.no_grad()
def square_sum(parameters: Iterable[Tensor]) -> Tensor:
    """This rank's share of the sum of squares of all gradients, a scalar in fp64.

    What several ranks hold is divided among them, so the shares of all ranks (every mesh axis and
    every pipeline stage) add up to the square of the norm that one process would have found.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_tensor(parameter.grad)
            by_copies.setdefault(num_copies(parameter), []).append(gradient)
    total = torch.zeros((), dtype=torch.float64)
    for copies, gradients in by_copies.items():
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=wide))
        total = total.to(norms.device) + norms.double().square().sum() / copies
    return total


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Scale all gradients in place so that ``norm``, their global norm, is at most ``max_norm``.

    Returns the factor, a scalar. Nothing waits for the device.
    """
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return factor
