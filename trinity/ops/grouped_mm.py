"""Routed experts: every token through its own few SwiGLU experts, weighted and summed.

``expert_ffn`` is the one entrance; its backends compute the same function:

``fused``       one autograd node with one gather in, one product per expert and matrix, one
                gather-and-sum out. The choice on a CPU.
``grouped_mm``  ``torch.nn.functional.grouped_mm`` over the sorted rows. The choice on a GPU.
``reference``   a loop over experts in plain autograd; slow, obvious, any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.core.errors import ConfigError
from trinity.ops.common import accumulate_dtype, compute_dtype, exact_dtypes, not_traced
from trinity.ops.elementwise import swiglu

BF16_SEGMENT_ROWS = 32
"""oneDNN compiles a bf16 product for each shape it meets and keeps 1024 of them; row counts of
experts change every step. Rounding them up to 32 leaves few shapes (an unseen one costs three
times a known one), and below 32 rows bf16 loses to fp32 anyway."""


def expert_ffn(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y_t = sum over k of weight_tk * down_e(silu(gate_e x_t) * up_e x_t), e = index_tk.

    Args:
        x_TD: tokens (T, D).
        gate_up_E2FD: gate matrices at index 0 and up matrices at index 1 of dim 1.
        down_EDF: down matrices.
        index_TK: chosen experts, int64, each in 0..E-1. A token may name one twice.
        weight_TK: routing weights, usually fp32.
        backend: a key of ``BACKENDS``, or "auto" for the best on the device of ``x_TD``.

    Products run in the dtype of ``x_TD`` (autocast's inside an autocast region); wider parameters
    are cast once per call and get gradients in their own dtype. Returns (T, D) in that dtype.
    Gradients flow to x, both stacks and the routing weights.

    Raises:
        ConfigError: unknown backend, or one that cannot run here.
    """
    name = _default_backend(x_TD) if backend == "auto" else backend
    if name not in BACKENDS:
        raise ConfigError(
            f"expert backend {name!r} does not exist; use one of auto, {', '.join(BACKENDS)}"
        )
    x_TD = x_TD.to(compute_dtype(x_TD))
    with exact_dtypes(x_TD):
        return BACKENDS[name](x_TD, gate_up_E2FD, down_EDF, index_TK, weight_TK)


def expert_ffn_reference(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """What ``expert_ffn`` computes, one expert at a time."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_E2FD.shape[0]):
        token, choice = torch.where(index_TK == expert)
        gate_FD, up_FD = gate_up_E2FD[expert].to(x_TD.dtype)
        x_RD = x_TD[token]
        hidden_RF = F.silu(x_RD @ gate_FD.mT) * (x_RD @ up_FD.mT)
        out_RD = hidden_RF @ down_EDF[expert].to(x_TD.dtype).mT
        weighted_RD = out_RD * weight_TK[token, choice].unsqueeze(-1)
        y_TD = y_TD.index_add(0, token, weighted_RD.to(x_TD.dtype))
    return y_TD


class _Layout(NamedTuple):
    """Where each routed pair stands once rows are grouped by expert, each group padded."""

    source_R: Tensor
    """Token of each row; rows of padding name token 0 and weigh nothing."""
    slot_TK: Tensor
    """Row of each (token, choice)."""
    segment_rows: list[int]
    """Rows of each expert, padding included."""


def _layout(index_TK: Tensor, num_experts: int, multiple: int) -> _Layout:
    """Stable grouping: within an expert, rows keep the order of their tokens."""
    expert_R = index_TK.reshape(-1)
    order_R = torch.argsort(expert_R, stable=True)
    count_E = torch.bincount(expert_R, minlength=num_experts)
    padded_E = (count_E + (multiple - 1)).div_(multiple, rounding_mode="floor").mul_(multiple)
    shift_E = (padded_E - count_E).cumsum(0) - (padded_E - count_E)
    row_R = torch.arange(len(order_R), device=order_R.device) + shift_E[expert_R[order_R]]
    segment_rows = padded_E.tolist()
    source_R = order_R.new_zeros(sum(segment_rows))
    source_R.index_copy_(0, row_R, order_R // index_TK.shape[1])
    slot_TK = torch.empty_like(order_R).index_copy_(0, order_R, row_R).view(index_TK.shape)
    return _Layout(source_R, slot_TK, segment_rows)


def _gather_sum(rows_RD: Tensor, slot_TK: Tensor) -> Tensor:
    """sum over k of rows[slot[:, k]]: fused gather and sum, ten times as fast as apart."""
    if slot_TK.numel() == 0:
        return rows_RD.new_zeros(slot_TK.shape[0], rows_RD.shape[1])
    return F.embedding_bag(slot_TK, rows_RD, mode="sum")


def _segment_products(rows_RX: Tensor, stack_EXY: Tensor, segments: list[int]) -> Tensor:
    """Each segment times its own matrix, (R, X) -> (R, Y)."""
    out_RY = rows_RX.new_empty(rows_RX.shape[0], stack_EXY.shape[2])
    parts = zip(
        rows_RX.split(segments), stack_EXY.unbind(0), out_RY.split(segments), segments, strict=True
    )
    for rows, matrix, out, num_rows in parts:
        if num_rows:
            torch.mm(rows, matrix, out=out)
    return out_RY


def _segment_outer(left_RX: Tensor, right_RY: Tensor, segments: list[int]) -> Tensor:
    """left^T right of each segment, (E, X, Y), written straight into the stack."""
    out_EXY = left_RX.new_empty(len(segments), left_RX.shape[1], right_RY.shape[1])
    parts = zip(
        left_RX.split(segments), right_RY.split(segments), out_EXY.unbind(0), segments, strict=True
    )
    for left, right, out, num_rows in parts:
        if num_rows:
            torch.mm(left.mT, right, out=out)
        else:
            out.zero_()
    return out_EXY


class _FusedExperts(torch.autograd.Function):
    """All routed experts as one node.

    Indexing a stacked parameter per expert under autograd would write a zero gradient of the whole
    stack for each expert. The routing weight multiplies the hidden activations (width F) instead of
    the outputs (width D), so the outputs need not be kept; kept are x, which the caller holds
    anyway, and the two pre-activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        weight_TK: Tensor,
        index_TK: Tensor,
    ) -> Tensor:
        dtype = x_TD.dtype
        num_experts = gate_up_E2FD.shape[0]
        multiple = BF16_SEGMENT_ROWS if dtype == torch.bfloat16 else 1
        source_R, slot_TK, segments = _layout(index_TK, num_experts, multiple)
        gate_up = gate_up_E2FD.flatten(1, 2).to(dtype)
        down = down_EDF.to(dtype)
        weight_R1 = weight_TK.new_zeros(len(source_R), 1, dtype=accumulate_dtype(dtype))
        weight_R1.view(-1).index_copy_(
            0, slot_TK.flatten(), weight_TK.reshape(-1).to(weight_R1.dtype)
        )
        hidden = _segment_products(x_TD.index_select(0, source_R), gate_up.mT, segments)
        gate_RF, up_RF = hidden.chunk(2, dim=1)
        weighted_RF = F.silu(gate_RF).mul_(up_RF).mul_(weight_R1)
        y_TD = _gather_sum(_segment_products(weighted_RF, down.mT, segments), slot_TK)
        ctx.save_for_backward(x_TD, hidden, weight_R1, gate_up, down, source_R, slot_TK)
        ctx.segments = segments
        ctx.dtypes = (gate_up_E2FD.dtype, down_EDF.dtype, weight_TK.dtype)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        with exact_dtypes(grad_TD):
            return _experts_backward(ctx, grad_TD)


def _experts_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, hidden, weight_R1, gate_up, down, source_R, slot_TK = ctx.saved_tensors
    gate_up_dtype, down_dtype, weight_dtype = ctx.dtypes
    needs_x, needs_gate_up, needs_down, needs_weight = ctx.needs_input_grad[:4]
    gate_RF, up_RF = hidden.chunk(2, dim=1)
    silu_RF = F.silu(gate_RF)
    act_RF = silu_RF * up_RF
    grad_RD = grad_TD.index_select(0, source_R)
    grad_RF = _segment_products(grad_RD, down, ctx.segments)
    grad_weight = grad_down = grad_gate_up = grad_x = None
    if needs_weight:
        dot_R = (grad_RF * act_RF).sum(1, dtype=weight_R1.dtype)
        grad_weight = dot_R.index_select(0, slot_TK.flatten()).view(slot_TK.shape).to(weight_dtype)
    if needs_down:
        grad_down = _segment_outer(grad_RD, act_RF.mul_(weight_R1), ctx.segments).to(down_dtype)
    if not (needs_x or needs_gate_up):
        return None, None, grad_down, grad_weight, None
    grad_RF.mul_(weight_R1)
    grad_hidden = torch.empty_like(hidden)
    torch.mul(grad_RF, silu_RF, out=grad_hidden[:, silu_RF.shape[1] :])
    grad_hidden[:, : silu_RF.shape[1]] = torch.ops.aten.silu_backward(grad_RF.mul_(up_RF), gate_RF)
    if needs_gate_up:
        x_RD = x_TD.index_select(0, source_R)
        outer = _segment_outer(grad_hidden, x_RD, ctx.segments)
        grad_gate_up = outer.unflatten(1, (2, -1)).to(gate_up_dtype)
    if needs_x:
        grad_x = _gather_sum(_segment_products(grad_hidden, gate_up, ctx.segments), slot_TK)
    return grad_x, grad_gate_up, grad_down, grad_weight, None


@not_traced
def _fused(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    return _FusedExperts.apply(x_TD, gate_up_E2FD, down_EDF, weight_TK, index_TK)


@not_traced
def _grouped(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Sorted rows through ``F.grouped_mm``; no row count ever travels to the host.

    fp64 is refused: the CPU kernel has none.
    """
    dtype = x_TD.dtype
    if dtype == torch.float64:
        raise ConfigError('expert backend "grouped_mm" has no float64; use "fused" or "reference"')
    expert_R = index_TK.reshape(-1)
    order_R = torch.argsort(expert_R, stable=True)
    ends_E = torch.bincount(expert_R, minlength=gate_up_E2FD.shape[0]).cumsum(0).to(torch.int32)
    source_R = order_R // index_TK.shape[1]
    gate_up = gate_up_E2FD.flatten(1, 2).to(dtype)
    hidden = F.grouped_mm(x_TD.index_select(0, source_R), gate_up.mT, offs=ends_E)
    act_RF = swiglu(*hidden.chunk(2, dim=1))
    weight_R1 = weight_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    weighted_RF = (act_RF * weight_R1).to(dtype)
    out_RD = F.grouped_mm(weighted_RF, down_EDF.to(dtype).mT, offs=ends_E)
    slot_R = torch.empty_like(order_R).index_copy_(
        0, order_R, torch.arange(len(order_R), device=order_R.device)
    )
    # The sum's gradient has stride zero, which the CPU kernel rejects: index_select copies it.
    return out_RD.index_select(0, slot_R).unflatten(0, index_TK.shape).sum(1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fused": _fused,
    "grouped_mm": _grouped,
    "reference": expert_ffn_reference,
}


def _default_backend(x_TD: Tensor) -> str:
    return "fused" if x_TD.device.type == "cpu" else "grouped_mm"
