"""Norms, rotary positions and gates.

Eager PyTorch runs a norm or a rotation as six to ten passes over memory and keeps most of the
intermediate results for the backward. Here each is one autograd node that keeps only its inputs,
works in place where nobody looks and accumulates in fp32 at least; the ``*_reference`` functions
say what is computed, and autograd differentiates those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.common import accumulate_dtype


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, in fp32 at least, in x's dtype."""
    wide = x.to(accumulate_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight_D.to(wide.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dim, (..., D) -> (..., D) in the dtype of ``x``.

    The statistics and both products are formed in fp32 and rounded once. ``weight_D`` may be wider
    than ``x``; its gradient has its own dtype. On a CPU this is several times faster than
    ``F.rms_norm``, which is a chain of ten operations there.
    """
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    """dx = r * (gw - n * mean(gw * n)) with n = x * r, r = 1/rms, gw = grad * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.to(accumulate_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return wide.mul_(inverse_rms).mul_(weight_D.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        normed = x.to(wide, copy=True, memory_format=torch.contiguous_format).mul_(inverse_rms)
        grad = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        product = grad * normed
        weight = weight_D.to(wide)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.reshape(-1, len(weight)).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            projection = (product @ weight).div_(-len(weight)).unsqueeze(-1)
            grad_x = grad.mul_(weight).addcmul_(normed, projection).mul_(inverse_rms).to(x.dtype)
        return grad_x, grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Autograd's own two nodes are as fast as one that recomputes the silu."""
    return F.silu(gate) * up


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate)."""
    return x * torch.sigmoid(gate)


def rotary_reference(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, rotate_half([a, b]) = [-b, a] (NeoX layout)."""
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x_BHSd.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_BHSd * cos.to(x_BHSd.dtype) + rotated * sin.to(x_BHSd.dtype)


def rotary(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of ``x`` (..., S, d) by the angles of the tables.

    The tables are (S, d), or (B, S, d) for ``x`` (B, H, S, d) with positions of their own in each
    row, where B may be 1. They hold each frequency twice, (f, f), as :mod:`trinity.nn.rope` makes
    them; that is what lets the backward be the same rotation with the sine negated. No gradient
    flows to the tables.
    """
    return _Rotary.apply(x_BHSd, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BHSd, cos, sin, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, sign=-1), None, None


def _rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x_BHSd.shape[-1] // 2
    signed_sin = torch.cat((sin[..., :half] * -sign, sin[..., half:] * sign), dim=-1)
    cos, signed_sin = cos.to(x_BHSd.dtype), signed_sin.to(x_BHSd.dtype)
    if x_BHSd.ndim < 3:
        return (x_BHSd * cos).addcmul_(x_BHSd.roll(half, -1), signed_sin)
    # Projections leave heads next to channels: in that order, and with the tables repeated per
    # head, the innermost loops run over H * d elements instead of d.
    x_BSHd = x_BHSd.transpose(-3, -2)
    num_heads = x_BSHd.shape[-2]
    cos_BSHd, sin_BSHd = (
        table.unsqueeze(-2).expand(*table.shape[:-1], num_heads, -1).contiguous()
        for table in (cos, signed_sin)
    )
    return (x_BSHd * cos_BSHd).addcmul_(x_BSHd.roll(half, -1), sin_BSHd).transpose(-3, -2)
