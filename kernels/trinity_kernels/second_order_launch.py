"""Launches of the second-order kernels: which tensors, which sizes, which flags."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trinity_kernels import second_order_backward_triton as backward_tiles
from trinity_kernels import second_order_triton as tiles
from trinity_kernels.decay import Bounds, Decays, chunk_decays, document_bounds
from trinity_kernels.layout import Heads, launch, num_tiles
from trinity_kernels.reference import TINY_WEIGHT
from trinity_kernels.triangle import BlockedState, block_pairs, num_features


class SecondOrderOptions(NamedTuple):
    """What is not a tensor."""

    heads: Heads
    scale: float
    chunk: int
    """Positions per chunk, a multiple of ``block``."""
    normalize: bool
    want_final: bool
    precision: str
    block: int
    """Positions per tile."""
    feature_block: int
    """Coordinates per block; a tile of the state has their square as rows."""
    state_width: int
    """Columns of the state that one program carries."""
    num_warps: int
    num_stages: int

    @property
    def warps(self) -> dict[str, int]:
        """Keywords of every launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Rows(NamedTuple):
    """What follows from decays and documents, and every kernel reads."""

    decays: Decays
    bounds: Bounds | None

    @property
    def num_chunks(self) -> int:
        """N."""
        return self.decays.through_BVN.shape[2]


class OutputGradient(NamedTuple):
    """do, and per row of weights one over their sum W and -(do . o) / W, (B, H, S) fp32."""

    out: Tensor
    inverse: Tensor
    slope: Tensor


def rows_of(log_decay_BSV: Tensor, documents_BS: Tensor | None, chunk: int) -> Rows:
    """Decays by chunk and the bounds of documents."""
    bounds = None if documents_BS is None else document_bounds(documents_BS)
    return Rows(chunk_decays(log_decay_BSV, documents_BS, chunk), bounds)


def _state_like(tokens: Tensor, leading: tuple[int, ...], e: int, options: SecondOrderOptions):
    features = num_features(tokens.shape[3], options.feature_block)
    values = tokens.new_empty(*leading, features, e, dtype=torch.float32)
    sums = tokens.new_empty(*leading, features, dtype=torch.float32) if options.normalize else None
    return BlockedState(values, sums)


def chunk_states(
    x: Tensor,
    y: Tensor,
    rows: Rows,
    boundary: BlockedState | None,
    options: SecondOrderOptions,
    *,
    keep_all: bool,
    grad: OutputGradient | None = None,
) -> tuple[BlockedState | None, BlockedState]:
    """States that chunks receive (B, V, N, F, ...), if kept, and the one past the last chunk.

    With ``grad`` the walk goes backwards over queries x and output gradients y: the results are
    gradients of the states that leave the chunks, and of the initial state.
    """
    batch, num_tokens, num_x, d = x.shape
    e = y.shape[3]
    num_states, num_chunks = rows.decays.through_BVN.shape[1:]
    heads, reverse = options.heads, grad is not None
    final = _state_like(x, (batch, num_states), e, options)
    states = _state_like(x, (batch, num_states, num_chunks), e, options) if keep_all else None
    kept, first = states or final, boundary or final
    pairs_2P = block_pairs(d, options.feature_block, x.device)
    width = min(e, options.state_width)
    weight = rows.decays.into_BVS if reverse else rows.decays.out_BVS
    launch(
        tiles.second_state_kernel, (pairs_2P.shape[1], batch * num_states, e // width),
        x, y, weight, grad.inverse if grad else weight, grad.slope if grad else weight,
        rows.decays.through_BVN, pairs_2P, *_pointers(first), *_pointers(kept), *_pointers(final),
        1.0 if reverse else options.scale, num_tokens, num_chunks, options.chunk,
        num_x, y.shape[2], num_states, pairs_2P.shape[1],
        heads.per_state if reverse else 1, heads.per_key, options.block,
        d, e, options.feature_block, width, options.normalize, boundary is not None, keep_all,
        reverse, options.precision, **options.warps,
    )  # fmt: skip
    return states, final


def _pointers(state: BlockedState) -> tuple[Tensor, Tensor]:
    """A pointer must point somewhere, also where a flag says it is not read."""
    return state.values, state.values if state.sums is None else state.sums


def _sizes(q_BSHd: Tensor, rows: Rows, options: SecondOrderOptions, num_pairs: int) -> tuple:
    heads = options.heads
    return (
        options.scale, q_BSHd.shape[1], rows.num_chunks, options.chunk,
        heads.num_queries, heads.num_keys, heads.num_states, heads.num_outputs, num_pairs,
    )  # fmt: skip


def _tile_shape(d: int, e: int, options: SecondOrderOptions) -> tuple:
    heads = options.heads
    return (
        heads.per_state, heads.per_key, options.block, d, e, options.feature_block,
        options.normalize,
    )  # fmt: skip


def outputs(
    tokens: tuple[Tensor, Tensor, Tensor],
    rows: Rows,
    states: BlockedState | None,
    options: SecondOrderOptions,
    *,
    has_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o (B, S, heads, e), one over the sum of weights (B, heads, S), and what rounding took from o.

    The last only where o is normalised and of 16 bits. Without it do . o would be off by 2^-9 of
    itself, and a gradient divides the difference from do . v by scores that may be small.
    """
    q_BSHd, k_BSGd, v_BSVe = tokens
    heads = options.heads
    batch, num_tokens, _, d = q_BSHd.shape
    out = v_BSVe.new_empty(batch, num_tokens, heads.num_outputs, v_BSVe.shape[3])
    inverse = q_BSHd.new_empty(batch, heads.num_outputs, num_tokens, dtype=torch.float32)
    rest = torch.empty_like(out) if options.normalize and out.itemsize == 2 else None
    pairs_2P = block_pairs(d, options.feature_block, q_BSHd.device)
    begin = pairs_2P if rows.bounds is None else rows.bounds.begin_BS
    grid = (num_tiles(num_tokens, options.block), batch * heads.num_outputs)
    launch(
        tiles.second_output_kernel, grid,
        q_BSHd, k_BSGd, v_BSVe, rows.decays.prefix_BVS, begin, rows.decays.into_BVS, pairs_2P,
        *((out, out) if states is None else _pointers(states)),
        out, out if rest is None else rest, inverse,
        *_sizes(q_BSHd, rows, options, pairs_2P.shape[1]), TINY_WEIGHT,
        *_tile_shape(d, v_BSVe.shape[3], options), states is not None, has_initial,
        rows.bounds is not None, options.precision, rest is not None, **options.warps,
    )  # fmt: skip
    return out, inverse, rest


def query_gradient(
    tokens: tuple[Tensor, Tensor, Tensor],
    grad: OutputGradient,
    rows: Rows,
    states: BlockedState | None,
    options: SecondOrderOptions,
    *,
    has_initial: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of q, and what decays collect from queries, (B, heads, S)."""
    q_BSHd, k_BSGd, v_BSVe = tokens
    heads = options.heads
    batch, num_tokens, _, d = q_BSHd.shape
    dtype = q_BSHd.dtype if heads.per_key == 1 else torch.float32
    grad_q_BSHd = q_BSHd.new_empty(batch, num_tokens, heads.num_outputs, d, dtype=dtype)
    query_pairs_BHS = torch.empty_like(grad.inverse)
    pairs_2P = block_pairs(d, options.feature_block, q_BSHd.device)
    begin = pairs_2P if rows.bounds is None else rows.bounds.begin_BS
    grid = (num_tiles(num_tokens, options.block), batch * heads.num_outputs)
    launch(
        backward_tiles.second_query_kernel, grid,
        q_BSHd, k_BSGd, v_BSVe, grad.out, rows.decays.prefix_BVS, begin, rows.decays.into_BVS,
        pairs_2P,
        *((q_BSHd, q_BSHd) if states is None else _pointers(states)), grad.inverse, grad.slope,
        grad_q_BSHd, query_pairs_BHS, *_sizes(q_BSHd, rows, options, pairs_2P.shape[1]),
        *_tile_shape(d, v_BSVe.shape[3], options), states is not None, has_initial,
        rows.bounds is not None, options.precision, **options.warps,
    )  # fmt: skip
    return grad_q_BSHd.unflatten(2, (heads.num_queries, -1)).sum(3).to(
        q_BSHd.dtype
    ), query_pairs_BHS


def key_gradient(
    q_BSHd: Tensor | None,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    grad: OutputGradient | None,
    rows: Rows,
    grad_states: BlockedState | None,
    options: SecondOrderOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k and v, and what decays collect from keys and from leaving states, (B, V, S).

    Without q and ``grad`` only by way of the states.
    """
    heads = options.heads
    batch, num_tokens, _, d = k_BSGd.shape
    dtype = k_BSGd.dtype if heads.per_key == 1 else torch.float32
    grad_k_BSGd = k_BSGd.new_empty(batch, num_tokens, heads.num_states, d, dtype=dtype)
    grad_v_BSVe = torch.empty_like(v_BSVe)
    key_pairs_BVS = torch.empty_like(rows.decays.out_BVS)
    state_pairs_BVS = torch.zeros_like(key_pairs_BVS)
    pairs_2P = block_pairs(d, options.feature_block, k_BSGd.device)
    begin, end = (pairs_2P, pairs_2P) if rows.bounds is None else rows.bounds
    rows_grad = (k_BSGd, key_pairs_BVS, key_pairs_BVS) if grad is None else grad
    launch(
        backward_tiles.second_key_kernel,
        (num_tiles(num_tokens, options.block), batch * heads.num_states),
        k_BSGd if q_BSHd is None else q_BSHd, k_BSGd, v_BSVe, rows_grad[0],
        rows.decays.prefix_BVS, begin, end,
        rows.decays.out_BVS, pairs_2P,
        *((k_BSGd, k_BSGd) if grad_states is None else _pointers(grad_states)),
        *rows_grad[1:], grad_k_BSGd, grad_v_BSVe, key_pairs_BVS, state_pairs_BVS,
        *_sizes(k_BSGd, rows, options, pairs_2P.shape[1]),
        *_tile_shape(d, v_BSVe.shape[3], options),
        grad_states is not None, grad is not None, rows.bounds is not None, options.precision,
        **options.warps,
    )  # fmt: skip
    grad_k_BSGd = grad_k_BSGd.unflatten(2, (heads.num_keys, -1)).sum(3).to(k_BSGd.dtype)
    return grad_k_BSGd, grad_v_BSVe, key_pairs_BVS, state_pairs_BVS
