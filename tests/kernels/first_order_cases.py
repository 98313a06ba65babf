"""First-order scan: shapes, head layouts, documents and decays that it must get right."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from trinity_kernels import first_order_final_state, first_order_scan
from trinity_kernels.reference import final_state_reference, scan_dense

from tests.kernels.harness import Errors, Maker, compare, relative_error


def _scan(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    heads: tuple[int, int, int] = (1, 1, 1),
    dims: tuple[int, int] = (16, 16),
    starts: list[list[int]] | None = None,
    initial: bool = False,
    chunk: int = 32,
    bias: float = 0.0,
    hot: bool = False,
) -> Errors:
    batch = len(starts) if starts else 1
    make = Maker(num_tokens, device, dtype)
    (num_q, num_k, num_v), (d, e) = heads, dims
    leaves = {
        "q_BSHd": make.normal(batch, num_tokens, num_q, d),
        "k_BSGd": make.normal(batch, num_tokens, num_k, d),
        "v_BSVe": make.normal(batch, num_tokens, num_v, e),
        "log_decay_BSV": make.log_decay(batch, num_tokens, num_v, bias=bias),
    }
    if hot:
        leaves["log_decay_BSV"][:, num_tokens // 3] = -2000.0
        leaves["log_decay_BSV"][:, num_tokens // 2 : num_tokens // 2 + 5] = -30.0
    if initial:
        leaves["initial_state"] = make.normal(batch, num_v, d, e, dtype=torch.float32)
    documents = make.documents(starts, num_tokens) if starts else None
    shared = {"scale": d**-0.5, "document_ids_BS": documents}
    return compare(
        functools.partial(first_order_scan, chunk_size=chunk, **shared),
        functools.partial(scan_dense, power=1, **shared),
        leaves,
    )


def _final_state(device: torch.device, dtype: torch.dtype) -> Errors:
    make = Maker(5, device, dtype)
    documents = make.documents([[], [40], [10, 11, 63]], 64)
    leaves = {
        "k_BSGd": make.normal(3, 64, 2, 16),
        "v_BSVe": make.normal(3, 64, 4, 32),
        "log_decay_BSV": make.log_decay(3, 64, 4),
    }

    def reference(k_BSGd, v_BSVe, log_decay_BSV):
        features = k_BSGd.repeat_interleave(2, 2)
        return (final_state_reference(features, v_BSVe, log_decay_BSV, documents),)

    def kernel(k_BSGd, v_BSVe, log_decay_BSV):
        return (first_order_final_state(k_BSGd, v_BSVe, log_decay_BSV, documents),)

    return compare(kernel, reference, leaves)


def _fused_projection(device: torch.device, dtype: torch.dtype) -> Errors:
    """q, k and v as strided views of one projection."""
    make = Maker(4, device, dtype)
    decay = make.log_decay(2, 40, 2)
    leaves = {"qkv_BS3Hd": make.normal(2, 40, 3, 2, 16)}
    return compare(
        lambda qkv_BS3Hd: first_order_scan(*qkv_BS3Hd.unbind(2), decay, scale=0.25, chunk_size=32),
        lambda qkv_BS3Hd: scan_dense(*qkv_BS3Hd.unbind(2), decay.double(), scale=0.25, power=1),
        leaves,
    )


def _forget_everything(device: torch.device, dtype: torch.dtype) -> Errors:
    """A log decay of -inf ends what a document boundary at the same token ends."""
    make = Maker(8, device, dtype)
    q, k, v = (make.normal(1, 60, 2, 16) for _ in range(3))
    own = make.log_decay(1, 60, 2)
    ended = own.clone()
    ended[:, [20, 33]] = -float("inf")
    own, ended = own.requires_grad_(), ended.requires_grad_()
    want = first_order_scan(
        q, k, v, own, scale=0.25, document_ids_BS=make.documents([[20, 33]], 60), chunk_size=32
    )
    got = first_order_scan(q, k, v, ended, scale=0.25, chunk_size=32)
    (grad,) = torch.autograd.grad(got[0].sum() + got[1].sum(), ended)
    (want_grad,) = torch.autograd.grad(want[0].sum() + want[1].sum(), own)
    return {
        "output": relative_error(got[0].detach(), want[0].detach()),
        "final state": relative_error(got[1].detach(), want[1].detach()),
        "gradient of log_decay": relative_error(grad, want_grad),
    }


CASES: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "one token": functools.partial(_scan, num_tokens=1, initial=True),
    "63 tokens": functools.partial(_scan, num_tokens=63),
    "100 tokens, slow decay": functools.partial(_scan, num_tokens=100, bias=-6.0, initial=True),
    "257 tokens": functools.partial(_scan, num_tokens=257, chunk=64),
    "grouped queries": functools.partial(_scan, num_tokens=50, heads=(4, 2, 2), initial=True),
    "groups of values": functools.partial(_scan, num_tokens=50, heads=(2, 2, 4), initial=True),
    "values of a group in two programs": functools.partial(
        _scan, num_tokens=20, heads=(1, 1, 12), initial=True
    ),
    "wide keys, narrow values": functools.partial(_scan, num_tokens=40, dims=(32, 16)),
    "Mamba-2 head": functools.partial(_scan, num_tokens=40, heads=(1, 1, 2), dims=(128, 64)),
    "narrow keys, wide values": functools.partial(_scan, num_tokens=40, dims=(16, 64)),
    "documents": functools.partial(
        _scan, num_tokens=100, starts=[[], [32, 64], [1, 20, 21, 70, 99]], initial=True, bias=-3.0
    ),
    "documents, grouped queries": functools.partial(
        _scan, num_tokens=70, heads=(2, 1, 1), starts=[[33], [10, 69]], initial=True, bias=-3.0
    ),
    "very fast decay": functools.partial(_scan, num_tokens=90, hot=True, initial=True),
    "strided inputs": _fused_projection,
    "minus infinity": _forget_everything,
    "final state alone": _final_state,
}
