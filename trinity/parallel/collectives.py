"""Collectives that know their gradient, on plain tensors.

Tensor parallelism alternates between two states of the stream between matrices. With sequence
parallelism each rank holds its part of the positions (``gather_dim`` goes in and
``reduce_scatter_dim`` comes out); without, each holds all of it (``copy_to_ranks`` in,
``sum_over_ranks`` out). The collective of a backward is always the transpose of the forward's
(Megatron-LM, arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_dim(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate the ranks' parts along ``dim``; the backward sums and takes the own part."""
    return _GatherDim.apply(x, group, dim)


def reduce_scatter_dim(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Sum over the ranks and keep the own part of ``dim``; the backward gathers."""
    return _ReduceScatterDim.apply(x, group, dim)


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor, used differently by each rank; the backward sums over them."""
    return _CopyToRanks.apply(x, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' tensors, on each of them; the backward passes the gradient on."""
    return _SumOverRanks.apply(x, group)


def own_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's part of a tensor that all ranks hold; the backward gathers the parts."""
    return _OwnPart.apply(x, group, dim)


def join_parts(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Gather along ``dim`` what all ranks then use alike; the backward takes the own part."""
    return _JoinParts.apply(x, group, dim)


def exchange_rows(
    x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all over dim 0: ``send_rows[r]`` rows go to rank r, in order; the backward returns."""
    return _ExchangeRows.apply(x, list(send_rows), list(receive_rows), group)


class RowsInFlight:
    """An all-to-all over dim 0 that other work hides, in the forward and in the backward.

    ``start`` sends, ``finish`` waits. What is computed between the two runs while rows travel, and
    so does its gradient: the backward of ``finish`` sends the gradients off, that of ``start``
    waits, and the engine runs what was created between them in between.
    """

    def __init__(
        self, send_rows: Sequence[int], receive_rows: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        self.send_rows, self.receive_rows = list(send_rows), list(receive_rows)
        self.group = group
        self.pending: Any = None
        self.gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """Send; the result must not be read before ``finish`` has returned it."""
        return _StartRows.apply(x, self)

    def finish(self, x: Tensor) -> Tensor:
        """Wait until the rows of ``start`` are here."""
        return _FinishRows.apply(x, self)


def _gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    size = dist.get_world_size(group)
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x, group=group)
    return out.movedim(0, dim)


def _reduce_scattered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    size = dist.get_world_size(group)
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=group)
    return out.movedim(0, dim)


def _own(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _exchanged(
    x: Tensor, send_rows: list[int], receive_rows: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive_rows, send_rows, group=group)
    return out


class _GatherDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scattered(grad, ctx.group, ctx.dim), None, None


class _ReduceScatterDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scattered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.group, ctx.dim), None, None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own(x, group, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.group, ctx.dim), None, None


class _JoinParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own(grad, ctx.group, ctx.dim).contiguous(), None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: list[int],
        receive_rows: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.back = (receive_rows, send_rows, group)
        return _exchanged(x, send_rows, receive_rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, *ctx.back), None, None, None


class _StartRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: RowsInFlight) -> Tensor:
        ctx.flight = flight
        out = x.new_empty(sum(flight.receive_rows), *x.shape[1:])
        flight.pending = dist.all_to_all_single(
            out,
            x.contiguous(),
            flight.receive_rows,
            flight.send_rows,
            group=flight.group,
            async_op=True,
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        flight = ctx.flight
        flight.pending.wait()
        flight.pending, arrived, flight.gradient = None, flight.gradient, None
        return arrived, None


class _FinishRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: RowsInFlight) -> Tensor:
        ctx.flight = flight
        flight.pending.wait()
        flight.pending = None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.gradient = grad.new_empty(sum(flight.send_rows), *grad.shape[1:])
        flight.pending = dist.all_to_all_single(
            flight.gradient,
            grad.contiguous(),
            flight.send_rows,
            flight.receive_rows,
            group=flight.group,
            async_op=True,
        )
        return grad, None
