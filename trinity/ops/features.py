"""The feature map of squared attention: phi(q) . phi(k) = (q . k)^2 in d(d+1)/2 features.

phi(x) holds x_i^2, and sqrt(2) x_i x_j for i < j: the upper triangle of the outer product, row by
row. Two layouts of it are in use. The *triangle* has no entry twice; states are kept and handed
over in it. *Tiles* are what products are made of: outer products of two blocks of 16 entries, the
first not after the second, so that those on the diagonal hold both x_i x_j and x_j x_i (2560
instead of 2080 features at d = 64).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16


class Tile(NamedTuple):
    """The products of two blocks of entries."""

    first: slice
    second: slice
    factor: float
    """1 on the diagonal, elsewhere sqrt(2): such products stand for two."""
    features: slice
    """Where they lie among the features."""


def num_features(dim: int, power: int) -> int:
    """Features of a vector of ``dim`` entries, in the triangle for power 2."""
    return dim if power == 1 else dim * (dim + 1) // 2


def triangle_features(x: Tensor) -> Tensor:
    """phi of the last dim, in the triangle: (..., d) -> (..., d (d + 1) / 2)."""
    dim = x.shape[-1]
    row, column = torch.triu_indices(dim, dim, device=x.device)
    factor = 2.0 ** (0.5 * (row != column).to(x.dtype))
    return x[..., row] * x[..., column] * factor


@functools.cache
def tiles_of(dim: int) -> tuple[Tile, ...]:
    """The tiles of vectors of ``dim`` entries."""
    tiles: list[Tile] = []
    starts, end = range(0, dim, BLOCK), 0
    for a in starts:
        for b in starts[a // BLOCK :]:
            first, second = slice(a, min(a + BLOCK, dim)), slice(b, min(b + BLOCK, dim))
            begin, end = end, end + (first.stop - a) * (second.stop - b)
            tiles.append(Tile(first, second, 1.0 if a == b else math.sqrt(2), slice(begin, end)))
    return tuple(tiles)


def tile_features(x_NdC: Tensor, tile: Tile) -> Tensor:
    """One tile of phi of C vectors: (N, d, C) -> (N, features of the tile, C)."""
    left, right = x_NdC[:, tile.first] * tile.factor, x_NdC[:, tile.second]
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)


def add_tile_gradient(grad_NdC: Tensor, grad_NfC: Tensor, x_NdC: Tensor, tile: Tile) -> None:
    """Add to the gradient of x what that of one tile of phi(x) sends there."""
    left, right = x_NdC[:, tile.first], x_NdC[:, tile.second]
    grad = grad_NfC.unflatten(1, (left.shape[1], right.shape[1]))
    grad_NdC[:, tile.first].add_((grad * right.unsqueeze(1)).sum(2), alpha=tile.factor)
    grad_NdC[:, tile.second].add_((grad * left.unsqueeze(2)).sum(1), alpha=tile.factor)


def triangle_to_tiles(state: Tensor, dim: int) -> Tensor:
    """Features in dim -2 from one layout to the other."""
    to_tiles, weight, _, _ = _maps(dim)
    weight = weight.to(state).unsqueeze(-1)
    return state.index_select(-2, to_tiles.to(state.device)) * weight


def tiles_to_triangle(state: Tensor, dim: int) -> Tensor:
    """The inverse."""
    _, _, to_triangle, weight = _maps(dim)
    weight = weight.to(state).unsqueeze(-1)
    return state.index_select(-2, to_triangle.to(state.device)) * weight


@functools.cache
def _maps(dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each feature of the tiles, its place in the triangle and a weight; and the inverse."""
    place = torch.zeros(dim, dim, dtype=torch.int64)
    row, column = torch.triu_indices(dim, dim)
    place[row, column] = place[column, row] = torch.arange(len(row))
    to_tiles, weights = [], []
    for tile in tiles_of(dim):
        to_tiles.append(place[tile.first, tile.second].flatten())
        i = torch.arange(dim)[tile.first, None]
        j = torch.arange(dim)[None, tile.second]
        is_half = (tile.factor == 1.0) & (i != j)
        weights.append((0.5 ** (0.5 * is_half.double())).flatten())
    index, weight = torch.cat(to_tiles), torch.cat(weights)
    # Of two entries that hold the same product either would do; the last one written is taken.
    back = torch.zeros(len(row), dtype=torch.int64).scatter_(0, index, torch.arange(len(index)))
    return index, weight, back, 1.0 / weight[back]
