"""What every kernel computes, written the long way in plain PyTorch; any dtype, fp64 included.

The dense forms build the whole (S, S) matrix of weights, the recurrent ones walk token by token as
a decoder does. Both are differentiable. Nothing here is meant to be fast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.layout import heads_of

TINY_WEIGHT = 1e-30
"""A row whose weights sum to less than this has no direction to average in; its output is zero."""


def triangle_features(x: Tensor) -> Tensor:
    """phi(x), (..., d) -> (..., d (d + 1) / 2), with phi(x) . phi(y) = (x . y)^2.

    The upper triangle row by row: x_i^2 on the diagonal, sqrt(2) x_i x_j off it.
    """
    row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    factor = torch.where(row == column, x.new_ones(()), x.new_tensor(math.sqrt(2.0)))
    return x[..., row] * x[..., column] * factor


def spread_heads(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSVe: Tensor, log_decay_BSV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Repeat heads until all four have as many as the output."""
    heads = heads_of(q_BSHd.shape[2], k_BSGd.shape[2], v_BSVe.shape[2])
    return (
        q_BSHd.repeat_interleave(heads.per_key, 2),
        k_BSGd.repeat_interleave(heads.per_key * heads.per_state, 2),
        v_BSVe.repeat_interleave(heads.per_state, 2),
        log_decay_BSV.repeat_interleave(heads.per_state, 2),
    )


def decay_matrix(log_decay_BSH: Tensor, document_ids_BS: Tensor | None) -> Tensor:
    """log of the decay from token j to token i, (B, H, S, S); -inf where j does not reach i.

    Masked before any exponential: above the diagonal it would overflow.
    """
    prefix_BHS = log_decay_BSH.cumsum(1).transpose(1, 2)
    num_tokens = prefix_BHS.shape[2]
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=prefix_BHS.device).tril()
    if document_ids_BS is not None:
        visible = visible & (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :])
    difference = prefix_BHS.unsqueeze(3) - prefix_BHS.unsqueeze(2)
    return difference.masked_fill(~visible, -math.inf)


def _documents(document_ids_BS: Tensor | None, like_BS: Tensor) -> Tensor:
    return (
        torch.zeros_like(like_BS, dtype=torch.long)
        if document_ids_BS is None
        else (document_ids_BS.long())
    )


def final_state_reference(
    features_BSVD: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """State after the last token, of its document only: sum_j exp(S_last - S_j) f_j (x) v_j."""
    document_BS = _documents(document_ids_BS, log_decay_BSV[..., 0])
    prefix_BSV = log_decay_BSV.cumsum(1)
    alive_BS1 = (document_BS == document_BS[:, -1:]).unsqueeze(2)
    weight_BSV = (prefix_BSV[:, -1:] - prefix_BSV).exp() * alive_BS1
    state = torch.einsum("bsv,bsvd,bsve->bvde", weight_BSV, features_BSVD, v_BSVe)
    if initial_state is not None:
        left_BV = prefix_BSV[:, -1].exp() * alive_BS1[:, 0]
        state = state + left_BV[..., None, None] * initial_state
    return state


def scan_dense(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    *,
    scale: float,
    power: int,
    normalize: bool = False,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both scans: weights (scale q_i . k_j)^power exp(S_i - S_j), summed or averaged over j.

    The first order keeps the scale with the query, the second with the keys of its state, as the
    kernels do.
    """
    if normalize:
        v_BSVe = F.pad(v_BSVe, (0, 1), value=1.0)
    q, k, v, log_decay = spread_heads(q_BSHd, k_BSGd, v_BSVe, log_decay_BSV)
    weight = (torch.einsum("bihd,bjhd->bhij", q, k) * scale) ** power
    weight = weight * decay_matrix(log_decay, document_ids_BS).exp()
    out = torch.einsum("bhij,bjhe->bihe", weight, v)
    features_q = triangle_features(q) if power == 2 else q * scale
    features_k = triangle_features(k_BSGd * scale) if power == 2 else k_BSGd
    heads = heads_of(q_BSHd.shape[2], k_BSGd.shape[2], v_BSVe.shape[2])
    if initial_state is not None:
        document_BS = _documents(document_ids_BS, log_decay[..., 0])
        seen_BS1 = (document_BS == document_BS[:, :1]).unsqueeze(2)
        left_BSH = log_decay.cumsum(1).exp() * seen_BS1
        state = initial_state.repeat_interleave(heads.per_state, 1)
        out = out + torch.einsum("bsh,bshd,bhde->bshe", left_BSH, features_q, state)
    final = final_state_reference(
        features_k.repeat_interleave(heads.per_key, 2),
        v_BSVe,
        log_decay_BSV,
        document_ids_BS,
        initial_state,
    )
    return _normalized(out) if normalize else out, final


def _normalized(out: Tensor) -> Tensor:
    """Numerator over denominator, zero where there is nothing to average."""
    numerator, denominator = out[..., :-1], out[..., -1:]
    exists = denominator > TINY_WEIGHT
    return torch.where(exists, numerator / torch.where(exists, denominator, 1.0), 0.0)


def scan_recurrent(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    *,
    scale: float,
    power: int,
    normalize: bool = False,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same token by token: state_t = exp(A_t) state_{t-1} + f(k_t) (x) v_t, o_t = f(q_t) state.

    A state is emptied before the first token of every document but the row's first.
    """
    if normalize:
        v_BSVe = F.pad(v_BSVe, (0, 1), value=1.0)
    heads = heads_of(q_BSHd.shape[2], k_BSGd.shape[2], v_BSVe.shape[2])
    features_q = triangle_features(q_BSHd) if power == 2 else q_BSHd * scale
    features_k = triangle_features(k_BSGd * scale) if power == 2 else k_BSGd
    features_q = features_q.repeat_interleave(heads.per_key, 2)
    features_k = features_k.repeat_interleave(heads.per_key, 2)
    document_BS = _documents(document_ids_BS, log_decay_BSV[..., 0])
    batch, num_tokens, num_states, width = v_BSVe.shape
    state = initial_state
    if state is None:
        state = v_BSVe.new_zeros(batch, num_states, features_k.shape[3], width)
    outputs = []
    for t in range(num_tokens):
        same_B = document_BS[:, t] == document_BS[:, max(t - 1, 0)]
        left_BV = log_decay_BSV[:, t].exp() * same_B.unsqueeze(1)
        added = features_k[:, t].unsqueeze(3) * v_BSVe[:, t].unsqueeze(2)
        state = left_BV[..., None, None] * state + added
        read = state.repeat_interleave(heads.per_state, 1)
        outputs.append(torch.einsum("bhd,bhde->bhe", features_q[:, t], read))
    out = torch.stack(outputs, 1)
    return _normalized(out) if normalize else out, state


def forgetting_attention_reference(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSGe: Tensor,
    log_decay_BSG: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
) -> Tensor:
    """softmax over j of scale q_i . k_j + S_i - S_j, applied to v."""
    q, k, v, log_decay = spread_heads(q_BSHd, k_BSGd, v_BSGe, log_decay_BSG)
    score = torch.einsum("bihd,bjhd->bhij", q, k) * scale + decay_matrix(log_decay, document_ids_BS)
    return torch.einsum("bhij,bjhe->bihe", score.softmax(3), v)


def causal_conv_reference(
    x_BSC: Tensor,
    weight_Cw: Tensor,
    bias_C: Tensor | None = None,
    *,
    document_ids_BS: Tensor | None = None,
    initial_BwC: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y_t = act(bias + sum_m weight[:, w - 1 - m] x_{t - m}) over the m of t's own document."""
    num_taps = weight_Cw.shape[1]
    num_tokens = x_BSC.shape[1]
    document_BS = _documents(document_ids_BS, x_BSC[..., 0])
    if initial_BwC is None:
        initial_BwC = x_BSC.new_zeros(x_BSC.shape[0], num_taps - 1, x_BSC.shape[2])
    x = torch.cat([initial_BwC, x_BSC], 1)
    document = torch.cat([document_BS[:, :1].expand(-1, num_taps - 1), document_BS], 1)
    y_BSC = torch.zeros_like(x_BSC) if bias_C is None else bias_C.expand_as(x_BSC)
    for m in range(num_taps):
        first = num_taps - 1 - m
        same_BS = document[:, first : first + num_tokens] == document_BS
        tap = x[:, first : first + num_tokens] * weight_Cw[:, num_taps - 1 - m]
        y_BSC = y_BSC + tap * same_BS.unsqueeze(2)
    return F.silu(y_BSC) if activation == "silu" else y_BSC
