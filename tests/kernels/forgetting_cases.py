"""Softmax attention with a forget gate: ragged lengths, documents, grouped queries, fast decay."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from trinity_kernels import forgetting_attention
from trinity_kernels.reference import forgetting_attention_reference

from tests.kernels.harness import Errors, Maker, compare


def _attention(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    heads: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (16, 16),
    starts: list[list[int]] | None = None,
    bias: float = -3.0,
    hot: bool = False,
) -> Errors:
    batch = len(starts) if starts else 1
    make = Maker(num_tokens, device, dtype)
    (num_q, num_k), (d, e) = heads, dims
    leaves = {
        "q_BSHd": make.normal(batch, num_tokens, num_q, d),
        "k_BSGd": make.normal(batch, num_tokens, num_k, d),
        "v_BSGe": make.normal(batch, num_tokens, num_k, e),
        "log_decay_BSG": make.log_decay(batch, num_tokens, num_k, bias=bias),
    }
    if hot:
        leaves["log_decay_BSG"][:, num_tokens // 3] = -2000.0
        leaves["log_decay_BSG"][:, num_tokens // 2 : num_tokens // 2 + 5] = -30.0
    documents = make.documents(starts, num_tokens) if starts else None
    shared = {"scale": d**-0.5, "document_ids_BS": documents}
    return compare(
        lambda **leaves: (forgetting_attention(**leaves, **shared),),
        lambda **leaves: (forgetting_attention_reference(**leaves, **shared),),
        leaves,
    )


CASES: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "one token": functools.partial(_attention, num_tokens=1),
    "63 tokens": functools.partial(_attention, num_tokens=63, bias=0.0),
    "257 tokens": functools.partial(_attention, num_tokens=257),
    "grouped queries": functools.partial(_attention, num_tokens=100, heads=(4, 2)),
    "wide keys, narrow values": functools.partial(_attention, num_tokens=70, dims=(64, 32)),
    "documents": functools.partial(
        _attention, num_tokens=150, heads=(2, 1), starts=[[], [64, 128], [1, 20, 21, 149]]
    ),
    "very fast decay": functools.partial(_attention, num_tokens=90, hot=True),
}
