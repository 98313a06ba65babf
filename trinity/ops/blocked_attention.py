"""Attention as a walk over blocks of queries that touches only the keys a block can see.

One autograd node in plain PyTorch: batched products, biased softmax, explicit backward. On a CPU it
beats the fused kernel twofold for global layers in bf16, and by S / window on top for local ones,
where the fused kernel needs an S x S mask and does S x S work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.common import accumulate_dtype, exact_dtypes, not_traced, softmax_backward_

MAX_SAVED_BYTES = 96 * 2**20
"""Probabilities of one call are kept for the backward up to this size, else formed again there
(one product of seven and the softmax, about a seventh of the time)."""

TILE_BYTES = 3 * 2**19
"""Scores that sliding-window attention forms at a time."""

KEY_ALIGNMENT = 32
"""First keys of blocks are rounded down to this, so that products meet few distinct shapes."""


@not_traced
def blocked_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    window: int | None,
    starts_BS: Tensor | None,
    log_decay_BGS: Tensor | None = None,
) -> Tensor:
    """Causal attention, (B, H, S, d); see :func:`trinity.ops.attention.causal_attention`.

    ``starts_BS`` is, for each query, the position among the keys where its document starts. The
    queries are the last of the positions that have keys. ``log_decay_BGS`` is summed over the
    positions after a key, up to the query's, and added to the score.
    """
    tiling = _tiling(q_BHSd, k_BGSd, window)
    return _BlockedAttention.apply(q_BHSd, k_BGSd, v_BGSd, log_decay_BGS, window, starts_BS, tiling)


class _Tile(NamedTuple):
    """Consecutive blocks of queries that are computed together.

    Block j holds the queries from ``first + j * rows`` on and is given ``num_keys`` keys from
    ``first_key + j * rows`` on; some of them are hidden from some of its rows. Queries and keys
    are counted apart.
    """

    first: int
    num_blocks: int
    rows: int
    first_key: int
    num_keys: int

    def queries(self, x_BHSd: Tensor, num_groups: int) -> Tensor:
        """A view of the blocks' positions, (B, G, blocks, H / G, rows, d)."""
        end = self.first + self.num_blocks * self.rows
        x_BHnrd = x_BHSd[:, :, self.first : end].unflatten(2, (self.num_blocks, self.rows))
        return x_BHnrd.unflatten(1, (num_groups, -1)).transpose(2, 3)

    def stacked_queries(self, x_BHSd: Tensor, num_groups: int) -> Tensor:
        """A copy of them, one matrix per block and key head: (B * G * blocks, H / G * rows, d)."""
        return self.queries(x_BHSd, num_groups).flatten(3, 4).flatten(0, 2).contiguous()

    def stacked_keys(self, x_NSd: Tensor) -> Tensor:
        """A copy of what each block is given, (N * blocks, num_keys, d).

        Handed views instead, a batched product would copy them itself, each time and more slowly.
        """
        end = self.first_key + (self.num_blocks - 1) * self.rows + self.num_keys
        windows = x_NSd[:, self.first_key : end].unfold(1, self.num_keys, self.rows)
        return windows.mT.flatten(0, 1).contiguous()

    def add_to_keys(self, sum_NSd: Tensor, part: Tensor) -> None:
        """The transpose of ``stacked_keys``: add each block's share to the rows it was given."""
        for j, share in enumerate(part.unflatten(0, (-1, self.num_blocks)).unbind(1)):
            start = self.first_key + j * self.rows
            sum_NSd[:, start : start + self.num_keys].add_(share)


class _View:
    """Who sees whom in one call, cut into tiles."""

    def __init__(
        self,
        like: Tensor,
        num_keys: int,
        window: int | None,
        starts_BS: Tensor | None,
        log_decay_BGS: Tensor | None,
    ) -> None:
        self.like = like
        # In fp64: over a long row the sums grow large, and only small differences count.
        self.sums_NS = (
            None if log_decay_BGS is None else log_decay_BGS.double().cumsum(-1).flatten(0, 1)
        )
        self.num_tokens = like.shape[2]
        self.num_before = num_keys - self.num_tokens
        """Keys before the first query's own."""
        self.reach = num_keys if window is None else window
        self.starts_BS = starts_BS
        self.earliest_S = self.latest_S = [0] * self.num_tokens
        if starts_BS is not None:
            self.earliest_S, self.latest_S = starts_BS.amin(0).tolist(), starts_BS.amax(0).tolist()
        self.biases: dict[tuple[str, int, int, int], Tensor] = {}

    def tiles(self, block_rows: int, tile_blocks: int) -> Iterator[_Tile]:
        """Cover all queries, in order.

        Blocks near the row's beginning are given fewer keys than the others and stand alone; so do
        all blocks of a global layer, and the shorter last one.
        """
        history = -(-(self.reach - 1) // KEY_ALIGNMENT) * KEY_ALIGNMENT
        first = 0
        while first < self.num_tokens:
            rows = min(block_rows, self.num_tokens - first)
            first_key, num_blocks = first + self.num_before - history, 1
            if first_key >= 0:
                num_blocks = min(tile_blocks, (self.num_tokens - first) // rows)
            if num_blocks == 1:
                earliest = self.earliest_S[first] // KEY_ALIGNMENT * KEY_ALIGNMENT
                first_key = max(first_key, earliest)
            num_keys = first + self.num_before + rows - first_key
            yield _Tile(first, num_blocks, rows, first_key, num_keys)
            first += num_blocks * rows

    def hide(self, scores: Tensor, tile: _Tile) -> None:
        """Put -inf on unseen keys; scores (B, G, blocks, H / G, rows, keys)."""
        offset, rows = tile.first + self.num_before - tile.first_key, tile.rows
        scores[..., offset:].add_(self._bias("after", 0, rows, rows))
        num_outside = offset + rows - self.reach
        if num_outside > 0:
            scores[..., :num_outside].add_(
                self._bias("until", offset - self.reach, rows, num_outside)
            )
        if self.starts_BS is None:
            return
        end = tile.first + tile.num_blocks * rows
        if self.latest_S[end - 1] <= tile.first_key:
            return
        device = self.starts_BS.device
        block_key = torch.arange(tile.num_blocks, device=device) * rows + tile.first_key
        key = block_key[:, None] + torch.arange(tile.num_keys, device=device)
        starts_Bnr = self.starts_BS[:, tile.first : end].unflatten(1, (tile.num_blocks, rows))
        foreign = key[:, None] < starts_Bnr[..., None]
        scores.add_(_minus_infinity(foreign, self.like)[:, None, :, None])

    def decay(self, scores_Nqk: Tensor, tile: _Tile) -> None:
        """Add the decay from each key to the first query of its block; scores (N * blocks, q, k).

        What is left from there to the query is the same for all keys of the query, and cancels.
        """
        if self.sums_NS is None:
            return
        of_key = tile.stacked_keys(self.sums_NS.unsqueeze(-1)).squeeze(-1)
        first = tile.first + self.num_before - tile.first_key
        scores_Nqk.add_((of_key[:, first : first + 1] - of_key).unsqueeze(1))

    def _bias(self, side: str, diagonal: int, rows: int, columns: int) -> Tensor:
        """The triangle of keys "after" column row + diagonal, or of those "until" it."""
        key = (side, diagonal, rows, columns)
        if key not in self.biases:
            column, last = torch.arange(columns), torch.arange(rows)[:, None] + diagonal
            mask = column > last if side == "after" else column <= last
            self.biases[key] = _minus_infinity(mask, self.like)
        return self.biases[key]


def _minus_infinity(mask: Tensor, like: Tensor) -> Tensor:
    """-inf where ``mask``, else 0. Adding it takes a fifth of the time of ``masked_fill_``."""
    bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(mask.to(like.device), float("-inf"))


class _BlockedAttention(torch.autograd.Function):
    """Tile by tile: scores, softmax, output.

    The queries of a group are stacked as rows of one matrix per key head, so that keys and values
    are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHSd: Tensor,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        log_decay_BGS: Tensor | None,
        window: int | None,
        starts_BS: Tensor | None,
        tiling: tuple[int, int],
    ) -> Tensor:
        k_NSd, v_NSd = k_BGSd.flatten(0, 1), v_BGSd.flatten(0, 1)
        out_BHSd = torch.empty_like(q_BHSd)
        num_groups = k_BGSd.shape[1]
        view = _View(q_BHSd, k_NSd.shape[1], window, starts_BS, log_decay_BGS)
        saved: list[Tensor] = []
        saved_bytes = 0
        for tile in view.tiles(*tiling):
            q_Nqd = tile.stacked_queries(q_BHSd, num_groups)
            p_Nqk = _probabilities(q_Nqd, tile.stacked_keys(k_NSd), tile, view)
            out = tile.queries(out_BHSd, num_groups)
            out.copy_(torch.bmm(p_Nqk, tile.stacked_keys(v_NSd)).view(out.shape))
            saved_bytes += p_Nqk.nbytes
            if saved_bytes <= MAX_SAVED_BYTES:
                saved.append(p_Nqk)
            else:
                saved.clear()
        ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSd, starts_BS, log_decay_BGS, *saved)
        ctx.window, ctx.tiling = window, tiling
        return out_BHSd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSd: Tensor) -> tuple[Tensor | None, ...]:
        with exact_dtypes(grad_BHSd):
            return (*_blocked_backward(ctx, grad_BHSd), None, None, None)


def _probabilities(q_Nqd: Tensor, k_Nkd: Tensor, tile: _Tile, view: _View) -> Tensor:
    """Attention weights of a tile, (B * G * blocks, H / G * rows, keys)."""
    scores = q_Nqd.new_empty(*q_Nqd.shape[:2], tile.num_keys)
    scale = q_Nqd.shape[-1] ** -0.5
    torch.baddbmm(scores, q_Nqd, k_Nkd.mT, beta=0, alpha=scale, out=scores)
    batch = view.like.shape[0]
    view.decay(scores, tile)
    view.hide(scores.view(batch, -1, tile.num_blocks, *_rows(q_Nqd, tile), tile.num_keys), tile)
    return torch.softmax(scores, -1, out=scores)  # the kernel has read a row before it writes it


def _rows(q_Nqd: Tensor, tile: _Tile) -> tuple[int, int]:
    return q_Nqd.shape[1] // tile.rows, tile.rows


def _blocked_backward(ctx: Any, grad_BHSd: Tensor) -> tuple[Tensor | None, ...]:
    q_BHSd, k_BGSd, v_BGSd, starts_BS, log_decay_BGS, *saved = ctx.saved_tensors
    num_groups, scale = k_BGSd.shape[1], q_BHSd.shape[-1] ** -0.5
    k_NSd, v_NSd = k_BGSd.flatten(0, 1), v_BGSd.flatten(0, 1)
    grad_q = torch.empty_like(q_BHSd)
    wide = accumulate_dtype(k_NSd.dtype)
    grad_k = k_NSd.new_zeros(k_NSd.shape, dtype=wide)
    grad_v = v_NSd.new_zeros(v_NSd.shape, dtype=wide)
    view = _View(q_BHSd, k_NSd.shape[1], ctx.window, starts_BS, log_decay_BGS)
    grad_sums_NS1 = None if view.sums_NS is None else torch.zeros_like(view.sums_NS).unsqueeze(-1)
    for index, tile in enumerate(view.tiles(*ctx.tiling)):
        q_Nqd = tile.stacked_queries(q_BHSd, num_groups)
        grad_Nqd = tile.stacked_queries(grad_BHSd, num_groups)
        k_Nkd = tile.stacked_keys(k_NSd)
        p_Nqk = saved[index] if saved else _probabilities(q_Nqd, k_Nkd, tile, view)
        tile.add_to_keys(grad_v, torch.bmm(p_Nqk.mT, grad_Nqd))
        grad_Nqk = torch.bmm(grad_Nqd, tile.stacked_keys(v_NSd).mT)
        softmax_backward_(grad_Nqk, p_Nqk)
        if grad_sums_NS1 is not None:
            part = grad_Nqk.sum(1, dtype=wide).neg_().unsqueeze(-1)
            tile.add_to_keys(grad_sums_NS1, part.double())
        tile.add_to_keys(grad_k, torch.bmm(grad_Nqk.mT, q_Nqd))
        target = tile.queries(grad_q, num_groups)
        torch.mul(torch.bmm(grad_Nqk, k_Nkd).view(target.shape), scale, out=target)
    grad_k = grad_k.mul_(scale).to(k_BGSd.dtype).view(k_BGSd.shape)
    grad_decay = None
    if grad_sums_NS1 is not None:
        # A log decay is part of the sums of all later keys.
        grad_NS = grad_sums_NS1.squeeze(-1).flip(-1).cumsum(-1).flip(-1)
        grad_decay = grad_NS.to(log_decay_BGS.dtype).view(log_decay_BGS.shape)
    return grad_q, grad_k, grad_v.to(v_BGSd.dtype).view(v_BGSd.shape), grad_decay


def _tiling(q_BHSd: Tensor, k_BGSd: Tensor, window: int | None) -> tuple[int, int]:
    """(rows of a block, blocks of a tile), from timings on a Zen 4 core with 1 MiB of cache.

    Small blocks waste few scores at the window's edges, but products want about 128 rows: a quarter
    of the window. Global layers waste only half a block per row. A tile's scores stay near cache.
    """
    batch, num_heads = q_BHSd.shape[:2]
    groups = num_heads // k_BGSd.shape[1]
    if window is None:
        return max(64, min(256, 256 // groups)), 1
    rows = max(16, min(128, window // 4))
    block_bytes = batch * num_heads * rows * (window + rows) * q_BHSd.element_size()
    return rows, max(1, TILE_BYTES // block_bytes)
