"""Softmax attention with a forget gate, with its gradient.

Kept for the backward: inputs, output and the log of each row's sum. Weights are made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity_kernels import forgetting_triton as tiles
from trinity_kernels.decay import Bounds, document_bounds, log_decay_gradient
from trinity_kernels.layout import Heads, launch, num_tiles, on_device_of
from trinity_kernels.tiles import row_dot_kernel


class AttentionOptions(NamedTuple):
    """What is not a tensor."""

    heads: Heads
    scale: float
    precision: str
    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """a . b over the last dim, (B, S, H, e) twice -> (B, H, S) fp32."""
    batch, num_tokens, num_heads, width = a.shape
    out_BSHe = a.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    launch(
        row_dot_kernel,
        (num_tiles(num_tokens, 64), batch * num_heads),
        a,
        b,
        out_BSHe,
        num_tokens,
        num_heads,
        64,
        width,
        num_warps=4,
    )
    return out_BSHe


def _prefix_sums(log_decay_BSG: Tensor) -> Tensor:
    return log_decay_BSG.double().cumsum(1).transpose(1, 2).contiguous()


def _shared(
    k_BSGd: Tensor, v_BSGe: Tensor, bounds: Bounds | None, options: AttentionOptions
) -> tuple:
    """The constants that end every launch."""
    return (
        options.heads.per_state, options.block_queries, options.block_keys,
        k_BSGd.shape[3], v_BSGe.shape[3], bounds is not None, options.precision,
    )  # fmt: skip


class ForgettingAttention(torch.autograd.Function):
    """Inputs contiguous and checked; see ``trinity_kernels.forgetting_attention``."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSGe: Tensor,
        log_decay_BSG: Tensor,
        documents_BS: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        batch, num_tokens, num_queries, _ = q_BSHd.shape
        out_BSHe = v_BSGe.new_empty(batch, num_tokens, num_queries, v_BSGe.shape[3])
        lse_BHS = q_BSHd.new_empty(batch, num_queries, num_tokens, dtype=torch.float32)
        bounds = None if documents_BS is None else document_bounds(documents_BS)
        grid = (num_tiles(num_tokens, options.block_queries), batch * num_queries)
        with on_device_of(q_BSHd):
            launch(
                tiles.forgetting_forward_kernel, grid,
                q_BSHd, k_BSGd, v_BSGe, _prefix_sums(log_decay_BSG),
                q_BSHd if bounds is None else bounds.begin_BS,
                out_BSHe, lse_BHS, options.scale, num_tokens, num_queries, k_BSGd.shape[2],
                *_shared(k_BSGd, v_BSGe, bounds, options),
                num_warps=options.num_warps, num_stages=options.num_stages,
            )  # fmt: skip
        ctx.save_for_backward(
            q_BSHd, k_BSGd, v_BSGe, log_decay_BSG, out_BSHe, lse_BHS, documents_BS
        )
        ctx.options = options
        return out_BSHe

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BSHe: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BSGd, v_BSGe, log_decay_BSG, out_BSHe, lse_BHS, documents_BS = ctx.saved_tensors
        with on_device_of(q_BSHd):
            grads = _backward(
                (q_BSHd, k_BSGd, v_BSGe, log_decay_BSG),
                out_BSHe,
                lse_BHS,
                documents_BS,
                grad_out_BSHe,
                ctx.options,
            )
        return *grads, None, None


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out_BSHe: Tensor,
    lse_BHS: Tensor,
    documents_BS: Tensor | None,
    grad_out_BSHe: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, ...]:
    q_BSHd, k_BSGd, v_BSGe, log_decay_BSG = inputs
    grad_out_BSHe = grad_out_BSHe.contiguous()
    batch, num_tokens, num_queries, _ = q_BSHd.shape
    num_keys = k_BSGd.shape[2]
    bounds = None if documents_BS is None else document_bounds(documents_BS)
    begin, end = (q_BSHd, q_BSHd) if bounds is None else bounds
    prefix_BGS, delta_BHS = _prefix_sums(log_decay_BSG), row_dots(grad_out_BSHe, out_BSHe)
    grad_q_BSHd, grad_k_BSGd, grad_v_BSGe = (torch.empty_like(t) for t in (q_BSHd, k_BSGd, v_BSGe))
    query_pairs_BHS = torch.empty_like(lse_BHS)
    key_pairs_BGS = lse_BHS.new_empty(batch, num_keys, num_tokens)
    sizes = (
        options.scale,
        num_tokens,
        num_queries,
        num_keys,
        *_shared(k_BSGd, v_BSGe, bounds, options),
    )
    warps = {"num_warps": options.num_warps, "num_stages": options.num_stages}
    rows = (prefix_BGS, begin, lse_BHS, delta_BHS)
    launch(
        tiles.forgetting_query_kernel,
        (num_tiles(num_tokens, options.block_queries), batch * num_queries),
        q_BSHd, k_BSGd, v_BSGe, grad_out_BSHe, *rows, grad_q_BSHd, query_pairs_BHS, *sizes, **warps,
    )  # fmt: skip
    rows = (prefix_BGS, begin, end, lse_BHS, delta_BHS)
    launch(
        tiles.forgetting_key_kernel,
        (num_tiles(num_tokens, options.block_keys), batch * num_keys),
        q_BSHd, k_BSGd, v_BSGe, grad_out_BSHe, *rows, grad_k_BSGd, grad_v_BSGe, key_pairs_BGS,
        *sizes, **warps,
    )  # fmt: skip
    pairs = query_pairs_BHS.unflatten(1, (num_keys, -1)).sum(2) - key_pairs_BGS
    return grad_q_BSHd, grad_k_BSGd, grad_v_BSGe, log_decay_gradient(pairs, None, None, num_tokens)
