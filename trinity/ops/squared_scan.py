"""The second-order scan as one autograd node: weights inside chunks, a squared state between them.

Short rows need no state: up to ``QUADRATIC_TOKENS`` all weights are formed, block by block. In
longer ones chunks are walked through one after another. Letters beside those of
:mod:`trinity.core.shapes`: ``N`` = B * U matrices, ``c`` tokens of a chunk or block, ``f`` features
in tiles, ``r`` query heads per state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.common import exact_dtypes, scratch_bmm
from trinity.ops.features import tiles_to_triangle, triangle_to_tiles
from trinity.ops.scan_inputs import ScanInputs, heads_of, runs_of
from trinity.ops.squared_state import (
    CHUNK_TOKENS,
    from_rows,
    grow,
    grow_backward,
    read,
    read_backward,
    token_rows,
    zero_state,
)

BLOCK_TOKENS = 64
"""Queries whose weights are formed at a time."""
QUADRATIC_TOKENS = {32: 512, 64: 2048, 128: 8192}
"""Up to this length a row is one chunk, by greatest width of a head (tools/bench/scan.py)."""


def quadratic_tokens(dim: int) -> int:
    """Length up to which a row of heads of width ``dim`` is one chunk."""
    longest = max(QUADRATIC_TOKENS.values())
    return next((n for width, n in QUADRATIC_TOKENS.items() if dim <= width), longest)


def usual_chunk_tokens(dim: int) -> int:
    """Tokens of a chunk of a longer row: the smaller the state, the more of them pay."""
    return CHUNK_TOKENS // 2 if dim <= 32 else CHUNK_TOKENS


def squared_scan(
    inputs: ScanInputs, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sums (B, S, H or U, e), not normalized, and the final state (B, U, triangle, e)."""
    assert inputs.power == 2
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    dim, num_tokens = inputs.k.shape[-1], inputs.k.shape[1]
    if chunk_tokens is None:
        fits = num_tokens <= quadratic_tokens(dim)
        chunk_tokens = num_tokens if fits else usual_chunk_tokens(dim)
    q_BSHd, k_BSUd = inputs.q, inputs.scaled_k
    if heads.values_per_key > 1:
        q_BSHd, k_BSUd = (
            x.repeat_interleave(heads.values_per_key, dim=2) for x in (q_BSHd, k_BSUd)
        )
    state = inputs.initial_state
    out_BSHe, state = _SquaredScan.apply(
        q_BSHd,
        k_BSUd,
        inputs.v,
        inputs.log_decay,
        None if state is None else triangle_to_tiles(state, dim),
        None if inputs.document_ids is None else runs_of(inputs.document_ids),
        chunk_tokens,
        inputs.return_state,
    )
    return out_BSHe, tiles_to_triangle(state, dim) if inputs.return_state else None


class _Chunk(NamedTuple):
    """A chunk's tokens and what their decays come to, fp32."""

    tokens: slice
    sums: Tensor
    """Of log decays, from the chunk's first token on: (N, c)"""
    inflow: Tensor
    """What is left, at each token, of the state before the chunk: (N, c)"""
    outflow: Tensor
    """What is left, after the chunk, of each token: (N, c)"""
    whole: Tensor
    """What is left, after the chunk, of the state before it: (N,)"""


class _Rows:
    """The rows of one call: its tensors per head, cut into chunks and those into blocks."""

    def __init__(
        self,
        q_BSHd: Tensor,
        k_BSUd: Tensor,
        v_BSUe: Tensor,
        log_decay_BSU: Tensor,
        run_BS: Tensor | None,
        chunk_tokens: int,
    ) -> None:
        self.batch, self.num_tokens, self.num_states, _ = k_BSUd.shape
        self.chunk_tokens = chunk_tokens
        self.wide = log_decay_BSU.dtype
        grouped = q_BSHd.unflatten(2, (self.num_states, -1))
        self.q_NrSd = grouped.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()
        self.k_NSd, self.v_NSe = token_rows(k_BSUd), token_rows(v_BSUe)
        self.log_decay_NS = log_decay_BSU.transpose(1, 2).flatten(0, 1)
        self.run_NS = None if run_BS is None else run_BS.repeat_interleave(self.num_states, 0)

    def chunks(self) -> Iterator[_Chunk]:
        """All chunks, in order."""
        for start in range(0, self.num_tokens, self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, self.num_tokens))
            # Sums start anew in each chunk: one over a long row would lose small differences.
            sums = self.log_decay_NS[:, tokens].cumsum(1)
            inflow, whole = sums.exp(), sums[:, -1].exp()
            outflow = (sums[:, -1:] - sums).exp_()
            if self.run_NS is not None:
                run = self.run_NS[:, tokens]
                # The initial state belongs to the first document, number 0.
                before = (
                    self.run_NS[:, start - 1 : start] if start else torch.zeros_like(run[:, :1])
                )
                inflow = inflow * (run == before)
                outflow = outflow * (run == run[:, -1:])
                whole = whole * (run[:, -1:] == before).squeeze(1)
            yield _Chunk(tokens, sums, inflow, outflow, whole)

    def queries(self, tokens: slice) -> Tensor:
        """Columns of the queries of a chunk, (N, d, r c), wide."""
        return self.q_NrSd[:, :, tokens].to(self.wide).permute(0, 3, 1, 2).flatten(2)

    def keys(self, tokens: slice) -> Tensor:
        """Columns of the keys of a chunk, (N, d, c), wide."""
        return self.k_NSd[:, tokens].to(self.wide).mT.contiguous()

    def per_query(self, x_Nc: Tensor) -> Tensor:
        """(N, c) for the tokens of a chunk -> (N, r c, 1) for its queries."""
        num = self.q_NrSd.shape[1]
        return x_Nc.unsqueeze(1).expand(-1, num, -1).reshape(len(x_Nc), -1, 1)

    def blocks(self, chunk: _Chunk) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries, the keys of the chunk that they see, and the decays between (N, 1, q, k)."""
        start, stop = chunk.tokens.start, chunk.tokens.stop
        for first in range(start, stop, BLOCK_TOKENS):
            queries = slice(first, min(first + BLOCK_TOKENS, stop))
            keys = slice(start, queries.stop)
            of_query = chunk.sums[:, queries.start - start : queries.stop - start]
            inside = of_query.unsqueeze(-1) - chunk.sums[:, : queries.stop - start].unsqueeze(-2)
            num_queries = queries.stop - queries.start
            # Masked before exp: above the diagonal it overflows.
            inside[..., -num_queries:].add_(
                torch.full((num_queries, num_queries), float("-inf")).triu_(1).to(inside)
            )
            if self.run_NS is not None:
                foreign = self.run_NS[:, queries].unsqueeze(-1) != self.run_NS[:, keys].unsqueeze(
                    -2
                )
                inside.masked_fill_(foreign, float("-inf"))
            yield queries, keys, inside.exp_().unsqueeze(1)


class _SquaredScan(torch.autograd.Function):
    """Saves its inputs; weights and states are formed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSUd: Tensor,
        v_BSUe: Tensor,
        log_decay_BSU: Tensor,
        initial_state: Tensor | None,
        run_BS: Tensor | None,
        chunk_tokens: int,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = _Rows(q_BSHd, k_BSUd, v_BSUe, log_decay_BSU, run_BS, chunk_tokens)
        ctx.save_for_backward(q_BSHd, k_BSUd, v_BSUe, log_decay_BSU, initial_state, run_BS)
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)  # a state that nobody reads costs nothing
        out_NrSe = rows.v_NSe.new_empty(
            *rows.q_NrSd.shape[:3], rows.v_NSe.shape[-1], dtype=rows.wide
        )
        state = _first_state(rows, initial_state)
        chunks = rows.chunks()
        for chunk in chunks:
            for queries, keys, inside in rows.blocks(chunk):
                scores = _scores(rows, queries, keys)
                weights = scores.square_().mul_(inside).flatten(1, 2)
                block = scratch_bmm(weights, rows.v_NSe[:, keys]).to(rows.wide)
                out_NrSe[:, :, queries] = block.unflatten(1, scores.shape[1:3])
            if chunk.tokens.start or initial_state is not None:
                seen = read(rows.queries(chunk.tokens), state) * rows.per_query(chunk.inflow)
                out_NrSe[:, :, chunk.tokens] += seen.unflatten(1, (rows.q_NrSd.shape[1], -1))
            if return_state or chunk.tokens.stop < rows.num_tokens:
                state = _next_state(rows, chunk, state)
        num_states = rows.num_states
        out_BSHe = out_NrSe.unflatten(0, (-1, num_states)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return out_BSHe, state.unflatten(0, (-1, num_states)) if return_state else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return (*_squared_backward(ctx, grad_out, grad_state), None, None, None)


def _scores(rows: _Rows, queries: slice, keys: slice) -> Tensor:
    """q k^T, (N, r, queries, keys)."""
    q_Nqd = rows.q_NrSd[:, :, queries].flatten(1, 2)
    num_queries = queries.stop - queries.start
    return scratch_bmm(q_Nqd, rows.k_NSd[:, keys].mT).unflatten(1, (-1, num_queries))


def _first_state(rows: _Rows, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.flatten(0, 1).to(rows.wide)
    return zero_state(rows.k_NSd.mT, rows.v_NSe.to(rows.wide))


def _next_state(rows: _Rows, chunk: _Chunk, state: Tensor) -> Tensor:
    """The state after a chunk, in new memory."""
    state = state * chunk.whole[:, None, None]
    left = rows.v_NSe[:, chunk.tokens].to(rows.wide) * chunk.outflow.unsqueeze(-1)
    grow(state, rows.keys(chunk.tokens), left)
    return state


def _squared_backward(
    ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    q_BSHd, k_BSUd, v_BSUe, log_decay_BSU, initial_state, run_BS = ctx.saved_tensors
    with exact_dtypes(q_BSHd):
        rows = _Rows(q_BSHd, k_BSUd, v_BSUe, log_decay_BSU, run_BS, ctx.chunk_tokens)
        num_states, batch = rows.num_states, rows.batch
        grads = _Gradients(rows)
        grad_NrSe = rows.v_NSe.new_zeros(*rows.q_NrSd.shape[:3], rows.v_NSe.shape[-1])
        if grad_out is not None:
            grouped = grad_out.unflatten(2, (num_states, -1)).permute(0, 2, 3, 1, 4)
            grad_NrSe.copy_(grouped.flatten(0, 1))
        chunks = list(rows.chunks())
        states = [_first_state(rows, initial_state)]
        for chunk in chunks[:-1]:
            states.append(_next_state(rows, chunk, states[-1]))
        grad_Nfe = None if grad_state is None else grad_state.flatten(0, 1).to(rows.wide)
        for chunk in reversed(chunks):
            state = states.pop()
            grads.inside(chunk, grad_NrSe)
            if grad_Nfe is not None:
                grads.after(chunk, state, grad_Nfe)
            if chunk.tokens.start or initial_state is not None:
                grad_Nfe = grads.before(chunk, grad_NrSe, state, grad_Nfe)
            grads.close(chunk)
    grad_q = grads.q.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return (
        grad_q.to(q_BSHd.dtype),
        from_rows(grads.k, batch).to(k_BSUd.dtype),
        from_rows(grads.v, batch).to(v_BSUe.dtype),
        from_rows(grads.log_decay.unsqueeze(-1), batch).squeeze(-1),
        None if initial_state is None or grad_Nfe is None else grad_Nfe.unflatten(0, (batch, -1)),
    )


class _Gradients:
    """Gradients of one call, summed up chunk by chunk."""

    def __init__(self, rows: _Rows) -> None:
        self.rows, wide = rows, rows.wide
        self.q = torch.zeros_like(rows.q_NrSd, dtype=wide)
        self.k, self.v = (torch.zeros_like(x, dtype=wide) for x in (rows.k_NSd, rows.v_NSe))
        self.log_decay = torch.empty_like(rows.log_decay_NS)
        self.sums = torch.zeros_like(rows.log_decay_NS)
        """Of the sums of log decays within a chunk."""

    def inside(self, chunk: _Chunk, grad_NrSe: Tensor) -> None:
        """Through the weights between tokens of the chunk."""
        rows = self.rows
        for queries, keys, inside in rows.blocks(chunk):
            scores = _scores(rows, queries, keys)
            weighted = (scores * inside).flatten(1, 2)  # half of what the square's slope is
            weights = weighted * scores.flatten(1, 2)
            grad_Nqe = grad_NrSe[:, :, queries].flatten(1, 2)
            grad_weights = torch.bmm(grad_Nqe, rows.v_NSe[:, keys].mT)
            self.v[:, keys] += torch.bmm(weights.to(grad_Nqe.dtype).mT, grad_Nqe)
            grad_scores = (grad_weights * weighted).mul_(2).to(rows.k_NSd.dtype)
            grad_q = torch.bmm(grad_scores, rows.k_NSd[:, keys])
            self.q[:, :, queries] += grad_q.unflatten(1, scores.shape[1:3])
            self.k[:, keys] += torch.bmm(grad_scores.mT, rows.q_NrSd[:, :, queries].flatten(1, 2))
            exponents = (grad_weights * weights).unflatten(1, scores.shape[1:3]).sum(1)
            self.sums[:, queries] += exponents.sum(-1)
            self.sums[:, keys] -= exponents.sum(-2)

    def after(self, chunk: _Chunk, state: Tensor, grad_next: Tensor) -> None:
        """Through the state after the chunk: whole * state + phi(k) (outflow v)."""
        rows, tokens = self.rows, chunk.tokens
        k_Ndc = rows.keys(tokens)
        v_Nce = rows.v_NSe[:, tokens].to(rows.wide)
        left = v_Nce * chunk.outflow.unsqueeze(-1)
        grad_k, grad_left = torch.zeros_like(k_Ndc), torch.zeros_like(left)
        grow_backward(grad_next, k_Ndc, left, grad_k, grad_left)
        self.k[:, tokens] += grad_k.mT
        self.v[:, tokens] += grad_left * chunk.outflow.unsqueeze(-1)
        lost = (grad_left * left).sum(-1)
        passed = (grad_next * state).sum((1, 2)) * chunk.whole
        grad_sums = self.sums[:, tokens]
        grad_sums -= lost
        grad_sums[:, -1] += lost.sum(-1) + passed

    def before(
        self, chunk: _Chunk, grad_NrSe: Tensor, state: Tensor, grad_next: Tensor | None
    ) -> Tensor:
        """Through out += inflow phi(q) state, the state before the chunk; its gradient."""
        rows, tokens = self.rows, chunk.tokens
        num_queries = rows.q_NrSd.shape[1]
        q_Ndc = rows.queries(tokens)
        reaching = grad_NrSe[:, :, tokens].flatten(1, 2) * rows.per_query(chunk.inflow)
        grad_q = torch.zeros_like(q_Ndc)
        if grad_next is None:
            grad_state = torch.zeros_like(state)
        else:
            grad_state = grad_next * chunk.whole[:, None, None]
        read_backward(reaching, q_Ndc, state, grad_q, grad_state)
        self.q[:, :, tokens] += grad_q.unflatten(2, (num_queries, -1)).permute(0, 2, 3, 1)
        # phi is of second order: q . dq is twice the output times its gradient.
        seen = (q_Ndc * grad_q).sum(1).unflatten(1, (num_queries, -1)).sum(1)
        self.sums[:, tokens] += seen / 2
        return grad_state

    def close(self, chunk: _Chunk) -> None:
        """A log decay is part of the sums of all later tokens of its chunk."""
        tokens = chunk.tokens
        self.log_decay[:, tokens] = self.sums[:, tokens].flip(1).cumsum(1).flip(1)
