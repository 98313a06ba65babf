"""The state of the second-order scan: phi(k) (x) v summed over tokens.

phi is the feature map of :mod:`trinity.ops.features`; 2560 x (e + 1) numbers per head at d = 64.
phi(k) would take 32 times the memory of k, so it is formed tile by tile, inside the product that
uses it, and never kept. Letters: ``N`` = B * U matrices, ``c`` tokens, ``f`` features in tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.chunked_scan import end_decays
from trinity.ops.common import exact_dtypes
from trinity.ops.features import (
    add_tile_gradient,
    tile_features,
    tiles_of,
    tiles_to_triangle,
)
from trinity.ops.scan_inputs import ScanInputs, heads_of

CHUNK_TOKENS = 512
"""Tokens whose features are formed at a time."""


def second_order_final_state(inputs: ScanInputs) -> Tensor:
    """The final state alone, without an initial one; (B, U, triangle, e)."""
    heads = heads_of(inputs.k, inputs.k, inputs.v, inputs.log_decay)
    left_BSU = end_decays(inputs.log_decay, inputs.document_ids)
    wide = left_BSU.dtype
    k_BSUd = inputs.scaled_k.to(wide).repeat_interleave(heads.values_per_key, dim=2)
    weighted_BSUe = inputs.v.to(wide) * left_BSU.unsqueeze(-1)
    state_Nfe = _GrownState.apply(_columns(k_BSUd), token_rows(weighted_BSUe))
    state = state_Nfe.unflatten(0, (len(k_BSUd), -1))
    return tiles_to_triangle(state, k_BSUd.shape[-1])


def token_rows(x_BSUe: Tensor) -> Tensor:
    """(B, S, U, e) -> (N, S, e)."""
    return x_BSUe.transpose(1, 2).flatten(0, 1).contiguous()


def _columns(x_BSUd: Tensor) -> Tensor:
    """(B, S, U, d) -> (N, d, S): features of many tokens are formed fastest side by side."""
    return x_BSUd.permute(0, 2, 3, 1).flatten(0, 1).contiguous()


def from_rows(x_NSe: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`token_rows`."""
    return x_NSe.unflatten(0, (batch, -1)).transpose(1, 2)


class _GrownState(torch.autograd.Function):
    """sum over tokens of phi(k) (x) v: k (N, d, c), v (N, c, e) -> (N, f, e)."""

    @staticmethod
    def forward(ctx: Any, k_NdS: Tensor, v_NSe: Tensor) -> Tensor:
        ctx.save_for_backward(k_NdS, v_NSe)
        state = zero_state(k_NdS, v_NSe)
        for start in range(0, k_NdS.shape[2], CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            grow(state, k_NdS[..., piece], v_NSe[:, piece])
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nfe: Tensor) -> tuple[Tensor, Tensor]:
        k_NdS, v_NSe = ctx.saved_tensors
        grad_k, grad_v = torch.zeros_like(k_NdS), torch.zeros_like(v_NSe)
        with exact_dtypes(grad_Nfe):
            for start in range(0, k_NdS.shape[2], CHUNK_TOKENS):
                piece = slice(start, start + CHUNK_TOKENS)
                grow_backward(
                    grad_Nfe,
                    k_NdS[..., piece],
                    v_NSe[:, piece],
                    grad_k[..., piece],
                    grad_v[:, piece],
                )
        return grad_k, grad_v


def zero_state(k_NdS: Tensor, v_NSe: Tensor) -> Tensor:
    num_features = tiles_of(k_NdS.shape[1])[-1].features.stop
    return v_NSe.new_zeros(len(k_NdS), num_features, v_NSe.shape[-1])


def grow(state_Nfe: Tensor, k_Ndc: Tensor, v_Nce: Tensor) -> None:
    """state += phi(k) v, for the tokens of a chunk."""
    for tile in tiles_of(k_Ndc.shape[1]):
        state_Nfe[:, tile.features].baddbmm_(tile_features(k_Ndc, tile), v_Nce)


def grow_backward(
    grad_Nfe: Tensor, k_Ndc: Tensor, v_Nce: Tensor, grad_k_Ndc: Tensor, grad_v_Nce: Tensor
) -> None:
    """Add to the gradients of k and v what that of the state sends there."""
    for tile in tiles_of(k_Ndc.shape[1]):
        part = grad_Nfe[:, tile.features]
        grad_v_Nce.baddbmm_(tile_features(k_Ndc, tile).mT, part)
        add_tile_gradient(grad_k_Ndc, torch.bmm(part, v_Nce.mT), k_Ndc, tile)


def read(q_Ndc: Tensor, state_Nfe: Tensor) -> Tensor:
    """phi(q) . state, (N, c, e)."""
    out = q_Ndc.new_zeros(len(q_Ndc), q_Ndc.shape[2], state_Nfe.shape[2])
    for tile in tiles_of(q_Ndc.shape[1]):
        out.baddbmm_(tile_features(q_Ndc, tile).mT, state_Nfe[:, tile.features])
    return out


def read_backward(
    grad_Nce: Tensor, q_Ndc: Tensor, state_Nfe: Tensor, grad_q_Ndc: Tensor, grad_Nfe: Tensor
) -> None:
    """Add to the gradients of q and of the state what that of ``_read`` sends there."""
    for tile in tiles_of(q_Ndc.shape[1]):
        grad_Nfe[:, tile.features].baddbmm_(tile_features(q_Ndc, tile), grad_Nce)
        part = torch.bmm(state_Nfe[:, tile.features], grad_Nce.mT)
        add_tile_gradient(grad_q_Ndc, part, q_Ndc, tile)
