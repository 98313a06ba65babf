"""Muon: momentum, then an orthogonalised update for every matrix on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trinity.core.sharding import local_tensor
from trinity.ops.newton_schulz import orthogonalize, quintics
from trinity.optim.exchange import GroupOfAxes, MatrixExchange, matrix_axes, split_evenly

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
    Momentum is fp32, or fp64 for fp64 weights; it is sharded like the weight. Shards of whole
    matrices stay where they are; other shards travel (:mod:`trinity.optim.exchange`).
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
        group_of_axes: GroupOfAxes | None = None,
    ) -> None:
        """``group_of_axes`` is needed where weights are sharded within their matrices."""
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
        self._group_of_axes = group_of_axes
        self._exchanges: dict[Any, MatrixExchange] = {}

    def init_state(self) -> None:
        """Create the momentum of every parameter, so that a checkpoint can be loaded into it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._momentum(parameter)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, accept: Tensor | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        With ``accept``, a boolean scalar on the device, that is false nothing changes, whatever the
        gradients hold; nothing waits for its value.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buckets[_bucket_key(parameter)].append(parameter)
            for turn, parameters in enumerate(buckets.values()):
                exchange = self._exchange(parameters[0])
                sizes = [_work_elements(p, exchange) for p in parameters]
                for part in split_evenly(sizes, MAX_BUCKET_ELEMENTS):
                    self._step_bucket(parameters[part], group, exchange, turn, accept)
        return loss

    def exchanged_bytes(self) -> int:
        """Bytes this rank has sent to others since the last call."""
        total = sum(exchange.num_bytes for exchange in self._exchanges.values())
        for exchange in self._exchanges.values():
            exchange.num_bytes = 0
        return total

    def _step_bucket(
        self,
        parameters: list[Tensor],
        group: dict[str, Any],
        exchange: MatrixExchange | None,
        turn: int,
        accept: Tensor | None,
    ) -> None:
        local = [local_tensor(parameter) for parameter in parameters]
        rows, columns = local[0].shape[-2:]
        directions = [self._direction(p, group, accept) for p in parameters]
        num_matrices = [tensor.shape[:-2].numel() for tensor in local]
        stack = torch.cat(
            [u.reshape(n, rows, columns) for u, n in zip(directions, num_matrices, strict=True)]
        )
        if exchange is None:
            update = _orthogonalize(stack, group)
        else:
            owned = exchange.owned(len(stack), turn)
            whole = exchange.collect(stack.to(group["dtype"]), owned)
            whole = _orthogonalize(whole, group)
            update = exchange.give_back(whole, owned, stack)
        lr = float(group["lr"])
        scale = lr_scale(*parameters[0].shape[-2:])
        if accept is not None:
            update = update * accept
        for tensor, part in zip(local, update.split(num_matrices), strict=True):
            tensor.mul_(_if_accepted(accept, 1 - lr * group["weight_decay"], 1.0))
            tensor.add_(part.reshape(tensor.shape), alpha=-lr * scale)

    def _exchange(self, parameter: Tensor) -> MatrixExchange | None:
        """None where every matrix is whole on this rank."""
        axes = matrix_axes(parameter)
        if not axes:
            return None
        key = _bucket_key(parameter)
        if key not in self._exchanges:
            assert isinstance(parameter, DTensor)
            assert self._group_of_axes is not None
            group = self._group_of_axes(axes)
            self._exchanges[key] = MatrixExchange(parameter, axes, group)
        return self._exchanges[key]

    def _direction(self, parameter: Tensor, group: dict[str, Any], accept: Tensor | None) -> Tensor:
        assert parameter.grad is not None
        momentum = local_tensor(self._momentum(parameter))
        gradient = local_tensor(parameter.grad).to(momentum.dtype)
        if accept is not None:
            gradient = gradient.where(accept, 0.0)  # it may hold NaN
        momentum.mul_(_if_accepted(accept, group["momentum"], 1.0)).add_(gradient)
        if group["nesterov"]:
            return gradient.add(momentum, alpha=group["momentum"])
        return momentum

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(parameter, dtype=dtype)
        return state["momentum"]


def _if_accepted(accept: Tensor | None, value: float, otherwise: float) -> float | Tensor:
    if accept is None:
        return value
    wide = torch.full((), value, dtype=torch.float64, device=accept.device)
    return wide.where(accept, otherwise)


def _orthogonalize(stack: Tensor, group: dict[str, Any]) -> Tensor:
    return orthogonalize(
        stack,
        coefficients=group["coefficients"],
        num_iterations=group["num_iterations"],
        dtype=group["dtype"],
    )


def _work_elements(parameter: Tensor, exchange: MatrixExchange | None) -> int:
    """Elements that one rank orthogonalises for this tensor; the same on all ranks that share."""
    num_matrices = local_tensor(parameter).shape[:-2].numel()
    num_elements = num_matrices * parameter.shape[-2:].numel()
    return num_elements if exchange is None else num_elements // exchange.num_ranks


def _bucket_key(parameter: Tensor) -> Any:
    """Tensors with equal keys have matrices of one shape, sharded in one way."""
    shape = tuple(parameter.shape[-2:])
    axes = matrix_axes(parameter)
    if not axes:
        return shape
    assert isinstance(parameter, DTensor)
    # Placements count dims from the front: a stack of matrices is sharded in its own way.
    return shape, parameter.ndim, parameter.device_mesh, parameter.placements, axes
