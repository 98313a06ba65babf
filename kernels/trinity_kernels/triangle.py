"""States of the second order: the packed triangle outside, blocks of products inside.

Outside, feature (i, j), i <= j, of a head of width d is x_i^2 or sqrt(2) x_i x_j, row by row:
D = d (d + 1) / 2 of them. Inside, kernels make the plain products of two blocks of ``block``
coordinates at a time, for pairs of blocks I <= J, row by row. A pair of different blocks counts
twice in (q . k)^2; a block with itself holds x_i x_j and x_j x_i. Hence between the two layouts

    packed_ij = T_ij (i = j),   sqrt(2) T_ij (i < j).

One more column, that of ones, carries the sum of weights; inside it is a tensor of its own.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class BlockedState(NamedTuple):
    """What kernels read and write, fp32; F = pairs of blocks * block * block features."""

    values: Tensor
    """(..., F, e)"""
    sums: Tensor | None
    """(..., F), the column of ones; None without normalisation."""


class _Maps(NamedTuple):
    packed_of_F: Tensor
    weight_F: Tensor
    blocked_of_D: Tensor
    weight_D: Tensor


def num_features(d: int, block: int) -> int:
    """F, how many products the kernels keep for a head of width d."""
    num_blocks = d // block
    return num_blocks * (num_blocks + 1) // 2 * block * block


def block_pairs(d: int, block: int, device: torch.device) -> Tensor:
    """(2, pairs) int32: I and J of every pair, in the order of the blocked layout."""
    num_blocks = d // block
    return torch.triu_indices(num_blocks, num_blocks, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=32)
def _maps(d: int, block: int, device: torch.device) -> _Maps:
    first_P, second_P = block_pairs(d, block, device).long() * block
    inside = torch.arange(block, device=device)
    i_F = (first_P[:, None, None] + inside[:, None]).expand(-1, block, block).flatten()
    j_F = (second_P[:, None, None] + inside).expand(-1, block, block).flatten()
    low_F, high_F = torch.minimum(i_F, j_F), torch.maximum(i_F, j_F)
    packed_of_F = low_F * d - low_F * (low_F - 1) // 2 + high_F - low_F
    weight_F = torch.where(i_F == j_F, 1.0, math.sqrt(0.5)).float()
    upper_F = (i_F <= j_F).nonzero().squeeze(1)
    blocked_of_D = torch.empty(d * (d + 1) // 2, dtype=torch.long, device=device)
    blocked_of_D[packed_of_F[upper_F]] = upper_F
    return _Maps(packed_of_F, weight_F, blocked_of_D, 1.0 / weight_F[blocked_of_D])


def to_blocked(packed: Tensor, d: int, block: int, *, normalize: bool) -> BlockedState:
    """(..., D, e or e + 1) to the layout of the kernels."""
    maps = _maps(d, block, packed.device)
    state = packed.float().index_select(-2, maps.packed_of_F) * maps.weight_F.unsqueeze(1)
    return _split(state, normalize)


def to_packed(state: BlockedState, d: int, block: int) -> Tensor:
    """The inverse of ``to_blocked``; of a block with itself it reads the upper triangle."""
    maps = _maps(d, block, state.values.device)
    values = _joined(state).index_select(-2, maps.blocked_of_D)
    return values * maps.weight_D.unsqueeze(1)


def to_blocked_gradient(grad: BlockedState, d: int, block: int) -> Tensor:
    """Gradient of the packed input of ``to_blocked`` from that of its result."""
    maps = _maps(d, block, grad.values.device)
    weighted = _joined(grad) * maps.weight_F.unsqueeze(1)
    shape = (*weighted.shape[:-2], d * (d + 1) // 2, weighted.shape[-1])
    return weighted.new_zeros(shape).index_add_(-2, maps.packed_of_F, weighted)


def to_packed_gradient(packed: Tensor, d: int, block: int, *, normalize: bool) -> BlockedState:
    """Gradient of the blocked input of ``to_packed`` from that of its result."""
    maps = _maps(d, block, packed.device)
    weighted = packed.float() * maps.weight_D.unsqueeze(1)
    shape = (*packed.shape[:-2], num_features(d, block), packed.shape[-1])
    blocked = weighted.new_zeros(shape).index_copy_(-2, maps.blocked_of_D, weighted)
    return _split(blocked, normalize)


def _split(state: Tensor, normalize: bool) -> BlockedState:
    if not normalize:
        return BlockedState(state.contiguous(), None)
    return BlockedState(state[..., :-1].contiguous(), state[..., -1].contiguous())


def _joined(state: BlockedState) -> Tensor:
    if state.sums is None:
        return state.values
    return torch.cat([state.values, state.sums.unsqueeze(-1)], -1)
