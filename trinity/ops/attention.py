"""Causal attention: global or sliding-window, grouped queries, packed documents.

``causal_attention`` is the one entrance; its backends compute the same function:

``blocked``    one autograd node that walks over blocks of queries and touches only the keys a block
               can see: no S x S mask, no work outside the window or before the document.
``sdpa``       PyTorch's fused attention, for global layers; one call per document.
``reference``  the definition, with an S x S mask, in fp32 at least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.blocked_attention import blocked_attention
from trinity.ops.common import accumulate_dtype, compute_dtype, exact_dtypes, not_traced
from trinity.ops.triton_backends import triton_forgetting_attention


def causal_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    *,
    window: int | None,
    document_ids_BS: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys each token may see; (B, H, S, d).

    There may be more keys than queries: the queries are then the last tokens of the row that the
    keys make up.

    Token i sees tokens max(0, i - window + 1) .. i, that is ``window`` keys with itself, or all up
    to itself when ``window`` is None or at least S. With documents it also sees none before its
    document; a document is a run of equal ids, so an id that comes back later is a new document.

    Args:
        q_BHSd: queries; H is a multiple of G, query head h uses key head h // (H / G).
        k_BGSd: keys.
        v_BGSd: values.
        window: sliding window in tokens, itself included, or None for global attention.
        document_ids_BS: integers, one per key, or None when each row is one document.
        backend: a key of ``BACKENDS``, or "auto" for the fastest on this device.

    Raises:
        ConfigError: unknown backend, or one that cannot do what is asked.
    """
    num_tokens = k_BGSd.shape[2]
    if window is not None and window < 1:
        raise ConfigError(f"sliding window {window} must be at least 1 token, the token itself")
    if window is not None and window >= num_tokens:
        window = None
    dtype = compute_dtype(q_BHSd)
    q_BHSd, k_BGSd, v_BGSd = q_BHSd.to(dtype), k_BGSd.to(dtype), v_BGSd.to(dtype)
    if backend == "auto":
        backend = _default_backend(q_BHSd, k_BGSd, window, document_ids_BS)
    if backend not in BACKENDS:
        raise ConfigError(
            f"attention backend {backend!r} does not exist; use one of auto, {', '.join(BACKENDS)}"
        )
    with exact_dtypes(q_BHSd):
        return BACKENDS[backend](q_BHSd, k_BGSd, v_BGSd, window, document_ids_BS)


def forgetting_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    log_decay_BGS: Tensor,
    *,
    document_ids_BS: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """Global causal attention whose scores decay with distance; (B, H, S, d).

    The sum of ``log_decay`` (not positive, fp32) over the tokens after a key, up to the query, is
    added to the score: the core of 2Mamba-E (arXiv 2602.17363, section 6) and of the Forgetting
    Transformer (arXiv 2503.02130). There may be more keys than queries, as in
    :func:`causal_attention`. ``backend`` is "blocked", "reference", "triton", or "auto".
    """
    dtype = compute_dtype(q_BHSd)
    q_BHSd, k_BGSd, v_BGSd = q_BHSd.to(dtype), k_BGSd.to(dtype), v_BGSd.to(dtype)
    log_decay_BGS = log_decay_BGS.to(accumulate_dtype(log_decay_BGS.dtype))
    if backend == "auto":
        triton = q_BHSd.is_cuda and q_BHSd.shape[2] == k_BGSd.shape[2]
        backend = "triton" if triton else "blocked"
    with exact_dtypes(q_BHSd):
        if backend == "reference":
            return attention_reference(
                q_BHSd,
                k_BGSd,
                v_BGSd,
                window=None,
                document_ids_BS=document_ids_BS,
                log_decay_BGS=log_decay_BGS,
            )
        if backend == "blocked":
            return _blocked(q_BHSd, k_BGSd, v_BGSd, None, document_ids_BS, log_decay_BGS)
        if backend == "triton":
            return triton_forgetting_attention(
                q_BHSd, k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS
            )
    raise ConfigError(
        f"backend {backend!r} of forgetting attention does not exist; use auto, blocked, reference "
        "or triton"
    )


def attention_reference(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    *,
    window: int | None,
    document_ids_BS: Tensor | None,
    log_decay_BGS: Tensor | None = None,
) -> Tensor:
    """What ``causal_attention`` and ``forgetting_attention`` compute, with every score formed."""
    dtype = q_BHSd.dtype
    wide = accumulate_dtype(dtype)
    groups = q_BHSd.shape[1] // k_BGSd.shape[1]
    k_BHSd = k_BGSd.repeat_interleave(groups, dim=1).to(wide)
    v_BHSd = v_BGSd.repeat_interleave(groups, dim=1).to(wide)
    scores_BHSS = q_BHSd.to(wide) @ k_BHSd.mT * q_BHSd.shape[-1] ** -0.5
    num_queries, num_keys = q_BHSd.shape[2], k_BGSd.shape[2]
    if log_decay_BGS is not None:
        sums_BHS = log_decay_BGS.cumsum(-1).repeat_interleave(groups, dim=1)
        sums_BHSS = sums_BHS[..., -num_queries:, None] - sums_BHS[..., None, :]
        scores_BHSS = scores_BHSS + sums_BHSS.to(wide)
    position = torch.arange(num_keys, device=q_BHSd.device)
    distance_SS = position[-num_queries:, None] - position[None, :]
    hidden = distance_SS < 0
    if window is not None:
        hidden = hidden | (distance_SS >= window)
    if document_ids_BS is not None:
        starts_BS = document_starts(document_ids_BS)[:, -num_queries:]
        hidden = hidden | (position < starts_BS[:, :, None])[:, None]
    probabilities = scores_BHSS.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (probabilities @ v_BHSd).to(dtype)


def document_starts(document_ids_BS: Tensor) -> Tensor:
    """Position of the first token of each token's document, (B, S) int64."""
    position = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    begins = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    return torch.where(begins, position, 0).cummax(dim=1).values


def _blocked(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    window: int | None,
    document_ids_BS: Tensor | None,
    log_decay_BGS: Tensor | None = None,
) -> Tensor:
    starts_BS = None
    if document_ids_BS is not None:
        starts_BS = document_starts(document_ids_BS)[:, -q_BHSd.shape[2] :]
    return blocked_attention(q_BHSd, k_BGSd, v_BGSd, window, starts_BS, log_decay_BGS)


@not_traced
def _sdpa(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    window: int | None,
    document_ids_BS: Tensor | None,
) -> Tensor:
    """Fused attention. A mask would make it do all S x S work, so a window is refused."""
    if window is not None:
        raise ConfigError(
            'attention backend "sdpa" has no sliding window; use "auto" or "blocked" there'
        )
    if q_BHSd.shape[2] != k_BGSd.shape[2]:
        raise ConfigError(
            'attention backend "sdpa" has no keys before the first query, as context parallelism '
            'needs them; use "auto" or "blocked" there'
        )
    if document_ids_BS is None:
        return _sdpa_call(q_BHSd, k_BGSd, v_BGSd)
    starts_BS = document_starts(document_ids_BS)
    position = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    firsts = (starts_BS == position).flatten().nonzero().flatten()
    lengths = firsts.diff(append=firsts.new_tensor([starts_BS.numel()])).tolist()
    # Rows one after another; `split`, unlike slices, has a backward that is linear in the pieces.
    parts = (x.transpose(0, 1).flatten(1, 2).split(lengths, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
    outs = [
        _sdpa_call(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).squeeze(0).unflatten(1, starts_BS.shape).transpose(0, 1)


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cpu":
        # The CPU kernel's own expansion is a fifth slower at long rows.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _reference(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    window: int | None,
    document_ids_BS: Tensor | None,
) -> Tensor:
    return attention_reference(
        q_BHSd, k_BGSd, v_BGSd, window=window, document_ids_BS=document_ids_BS
    )


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, int | None, Tensor | None], Tensor]] = {
    "blocked": _blocked,
    "sdpa": _sdpa,
    "reference": _reference,
}


def _default_backend(
    q_BHSd: Tensor, k_BGSd: Tensor, window: int | None, document_ids_BS: Tensor | None
) -> str:
    if window is not None or q_BHSd.shape[2] != k_BGSd.shape[2]:
        return "blocked"
    if q_BHSd.device.type != "cpu":
        return "sdpa"
    long_fp32 = q_BHSd.dtype == torch.float32 and q_BHSd.shape[2] > 2048
    return "sdpa" if long_fp32 and document_ids_BS is None else "blocked"
