"""Muon: momentum, then an orthogonalised update for every matrix on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trinity.ops.newton_schulz import orthogonalize, quintics

MAX_BUCKET_ELEMENTS = 1 << 26
"""Elements orthogonalised in one call: bounds the working memory (about 5 copies)."""


def lr_scale(out_features: int, in_features: int) -> float:
    """sqrt(max(1, out/in)) (Trinity report, eq. 41): the best rate transfers over width."""
    return max(1.0, out_features / in_features) ** 0.5


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay (report, section 2.4).

    M <- mu M + G;  U = M, or G + mu M with Nesterov;
    W <- (1 - lr wd) W - lr sqrt(max(1, out/in)) orthogonalize(U).

    Weights are (..., out, in): leading dims are a batch of matrices, so a stack of experts
    (E, 2, F, D) is E * 2 matrices, each orthogonalised apart. Matrices of one shape share a call.
    Momentum is fp32, or fp64 for fp64 weights.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        coefficients: str = "trinity",
        num_iterations: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        quintics(coefficients, num_iterations)  # an unknown name fails here, not in step 1
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "coefficients": coefficients,
            "num_iterations": num_iterations,
            "dtype": dtype,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon takes matrices, got shape {tuple(parameter.shape)}")

    def init_state(self) -> None:
        """Create the momentum of every parameter, so that a checkpoint can be loaded into it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._momentum(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buckets[tuple(parameter.shape[-2:])].append(parameter)
            for parameters in buckets.values():
                for part in _split(parameters):
                    self._step_bucket(part, group)
        return loss

    def _step_bucket(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        rows, columns = parameters[0].shape[-2:]
        directions = [self._direction(p, group) for p in parameters]
        stack = torch.cat([u.reshape(-1, rows, columns) for u in directions])
        update = orthogonalize(
            stack,
            coefficients=group["coefficients"],
            num_iterations=group["num_iterations"],
            dtype=group["dtype"],
        )
        lr = float(group["lr"])
        num_matrices = [p.numel() // (rows * columns) for p in parameters]
        for parameter, part in zip(parameters, update.split(num_matrices), strict=True):
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(part.reshape(parameter.shape), alpha=-lr * lr_scale(rows, columns))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        momentum = self._momentum(parameter)
        gradient = parameter.grad.to(momentum.dtype)
        momentum.mul_(group["momentum"]).add_(gradient)
        if group["nesterov"]:
            return gradient.add(momentum, alpha=group["momentum"])
        return momentum

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(parameter, dtype=dtype)
        return state["momentum"]


def _split(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group parameters of one matrix shape so that no group exceeds the bucket size by much."""
    parts: list[list[Tensor]] = [[]]
    num_elements = 0
    for parameter in parameters:
        if parts[-1] and num_elements + parameter.numel() > MAX_BUCKET_ELEMENTS:
            parts.append([])
            num_elements = 0
        parts[-1].append(parameter)
        num_elements += parameter.numel()
    return parts
