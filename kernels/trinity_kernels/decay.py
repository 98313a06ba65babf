"""Decays of a chunked scan, and the gradient that flows back to them. Plain PyTorch.

Tensors here have one number per token and head, a hundredth of q, k and v; kernels for them would
save nothing. Prefix sums are kept in fp64: the difference of two fp32 sums over 8192 tokens at
2Mamba's initial decay is off by 5e-4, and differences are all the kernels ever use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_DECAY = -1e4
"""exp(-1e4) is zero. The clamp makes -inf (forget everything) an ordinary number, small enough for
fp64 sums over a million such tokens."""


class Decays(NamedTuple):
    """What the kernels read, head-major so that a chunk is contiguous."""

    prefix_BVS: Tensor
    """S_i, inclusive prefix sum of the log decay within the chunk, fp64."""
    into_BVS: Tensor
    """What is left at token i of the state that enters its chunk; 0 in a later document."""
    out_BVS: Tensor
    """What is left of token j in the state that leaves its chunk; 0 in an earlier document."""
    through_BVN: Tensor
    """What a chunk leaves of the state that enters it; 0 where a document begins inside."""
    chunk: int


def clamp_log_decay(log_decay: Tensor) -> Tensor:
    """fp32, never below ``MIN_LOG_DECAY``; the gradient of what is clamped is zero."""
    return log_decay.float().clamp_min(MIN_LOG_DECAY)


def leaving_weight(log_decay_BSV: Tensor, document_ids_BS: Tensor | None) -> Tensor:
    """exp(S_last - S_j) where j is of the row's last document, else 0; differentiable, fp32."""
    prefix_BSV = clamp_log_decay(log_decay_BSV).double().cumsum(1)
    weight_BSV = (prefix_BSV[:, -1:] - prefix_BSV).exp().float()
    if document_ids_BS is None:
        return weight_BSV
    return weight_BSV * (document_ids_BS == document_ids_BS[:, -1:]).unsqueeze(2)


def chunk_decays(log_decay_BSV: Tensor, document_ids_BS: Tensor | None, chunk: int) -> Decays:
    """Prefix sums and the three factors of every chunk of ``chunk`` tokens (the last is ragged).

    The initial state belongs to the document of the row's first token.
    """
    num_tokens = log_decay_BSV.shape[1]
    num_chunks = -(-num_tokens // chunk)
    padding = num_chunks * chunk - num_tokens
    log_decay_BVS = F.pad(log_decay_BSV.transpose(1, 2).double(), (0, padding))
    prefix_BVNC = log_decay_BVS.unflatten(2, (num_chunks, chunk)).cumsum(3)
    total_BVN1 = prefix_BVNC[..., -1:]
    into_BVNC = prefix_BVNC.exp()
    out_BVNC = (total_BVN1 - prefix_BVNC).exp()
    through_BVN = total_BVN1.squeeze(3).exp()
    if document_ids_BS is not None:
        first_N = torch.arange(num_chunks, device=document_ids_BS.device) * chunk
        before_BN1 = document_ids_BS[:, (first_N - 1).clamp_min(0)].unsqueeze(2)
        after_BN1 = document_ids_BS[:, (first_N + chunk - 1).clamp_max(num_tokens - 1)].unsqueeze(2)
        document_BNC = F.pad(document_ids_BS, (0, padding)).unflatten(1, (num_chunks, chunk))
        into_BVNC = into_BVNC * (document_BNC == before_BN1).unsqueeze(1)
        out_BVNC = out_BVNC * (document_BNC == after_BN1).unsqueeze(1)
        through_BVN = through_BVN * (before_BN1 == after_BN1).squeeze(2).unsqueeze(1)

    def per_token(x_BVNC: Tensor, dtype: torch.dtype) -> Tensor:
        return x_BVNC.flatten(2)[:, :, :num_tokens].to(dtype).contiguous()

    return Decays(
        per_token(prefix_BVNC, torch.float64),
        per_token(into_BVNC, torch.float32),
        per_token(out_BVNC, torch.float32),
        through_BVN.float().contiguous(),
        chunk,
    )


class Bounds(NamedTuple):
    """Where the document of each token begins and ends (one past its last), (B, S) int32.

    Beginnings also serve as document ids.
    """

    begin_BS: Tensor
    end_BS: Tensor


def document_bounds(document_ids_BS: Tensor) -> Bounds:
    """Beginning and end of the run of equal ids around every token."""
    num_tokens = document_ids_BS.shape[1]
    position_S = torch.arange(num_tokens, device=document_ids_BS.device, dtype=torch.int32)
    changed_BS = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    first_BS = F.pad(changed_BS, (1, 0), value=True)
    last_BS = F.pad(changed_BS, (0, 1), value=True)
    begin_BS = torch.where(first_BS, position_S, 0).cummax(1).values
    end_BS = torch.where(last_BS, position_S + 1, num_tokens).flip(1).cummin(1).values.flip(1)
    return Bounds(begin_BS.int().contiguous(), end_BS.int().contiguous())


def log_decay_gradient(
    pairs_BVS: Tensor, out_BVS: Tensor | None, through_BVN: Tensor | None, chunk: int
) -> Tensor:
    """dA_t = sum of all contributions that pass over token t, (B, S, V) fp32.

    pairs_BVS: per token i, gradient reaching S_i from pairs inside the chunk (as query minus as
        key, the diagonal left out) and from the state that enters it.
    out_BVS: per token j, its contribution through the state that leaves the chunk.
    through_BVN: contribution of the state that passes through the whole chunk.

    A contribution of (i, j) inside a chunk counts for j < t <= i: rows minus columns, summed from
    the end, leaves just that. Chunk by chunk and in fp64, so cancellation stays below fp32's grain.
    """
    num_tokens = pairs_BVS.shape[2]
    num_chunks = -(-num_tokens // chunk)
    padding = (0, num_chunks * chunk - num_tokens)

    def chunked(x_BVS: Tensor) -> Tensor:
        return F.pad(x_BVS.double(), padding).unflatten(2, (num_chunks, chunk))

    grad_BVNC = chunked(pairs_BVS)
    grad_BVNC = grad_BVNC.flip(3).cumsum(3).flip(3)
    if out_BVS is not None:
        out_BVNC = chunked(out_BVS)
        grad_BVNC = grad_BVNC + out_BVNC.cumsum(3) - out_BVNC
    if through_BVN is not None:
        grad_BVNC = grad_BVNC + through_BVN.double().unsqueeze(3)
    return grad_BVNC.flatten(2)[:, :, :num_tokens].transpose(1, 2).float()
