"""Second-order scan: both paths, head layouts, documents, decays, normalised or not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from trinity_kernels import second_order_final_state, second_order_scan
from trinity_kernels.reference import final_state_reference, scan_dense, triangle_features
from trinity_kernels.tuning import override

from tests.kernels.harness import Errors, Maker, compare


def _scan(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    heads: tuple[int, int, int] = (1, 1, 1),
    dims: tuple[int, int] = (16, 16),
    starts: list[list[int]] | None = None,
    initial: bool = False,
    chunk: int | None = 64,
    sizes: dict[str, int] | None = None,
    normalize: bool = True,
    final: bool = True,
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
        # A state that some keys could have made: its sums of weights are positive.
        k, v = make.normal(batch, 40, num_v, d), make.normal(batch, 40, num_v, e)
        v = torch.nn.functional.pad(v, (0, 1), value=1.0) if normalize else v
        zero = torch.zeros(batch, 40, num_v, device=device)
        features = triangle_features(k.float()) / d
        leaves["initial_state"] = final_state_reference(features, v.float(), zero)
    documents = make.documents(starts, num_tokens) if starts else None
    shared = {"scale": d**-0.5, "document_ids_BS": documents, "normalize": normalize}
    results = 2 if final else 1
    with override("second_order", **(sizes or {"block": 32, "feature_block": 16})):
        return compare(
            lambda **leaves: second_order_scan(
                **leaves, chunk_size=chunk, return_final_state=final, **shared
            )[:results],
            lambda **leaves: scan_dense(**leaves, power=2, **shared)[:results],
            leaves,
        )


def _final_state(device: torch.device, dtype: torch.dtype, *, normalize: bool) -> Errors:
    make = Maker(5, device, dtype)
    documents = make.documents([[], [40], [10, 11, 63]], 64)
    leaves = {
        "k_BSGd": make.normal(3, 64, 1, 16),
        "v_BSVe": make.normal(3, 64, 2, 32),
        "log_decay_BSV": make.log_decay(3, 64, 2),
    }

    def reference(k_BSGd, v_BSVe, log_decay_BSV):
        features = triangle_features(k_BSGd * 0.5).repeat_interleave(2, 2)
        if normalize:
            v_BSVe = torch.nn.functional.pad(v_BSVe, (0, 1), value=1.0)
        return (final_state_reference(features, v_BSVe, log_decay_BSV, documents),)

    def kernel(**leaves):
        options = {"scale": 0.5, "document_ids_BS": documents, "normalize": normalize}
        return (second_order_final_state(**leaves, **options),)

    return compare(kernel, reference, leaves)


def _first_output_is_first_value(device: torch.device, dtype: torch.dtype) -> Errors:
    make = Maker(3, device, dtype)
    q, k, v = (make.normal(2, 40, 1, 16) for _ in range(3))
    documents = make.documents([[7, 33], [1]], 40)
    with override("second_order", block=32):
        out, _ = second_order_scan(
            q, k, v, make.log_decay(2, 40, 1), scale=0.25, document_ids_BS=documents, chunk_size=32
        )
    first = torch.ones(2, 40, dtype=torch.bool, device=device)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return {"o_0 - v_0": float((out - v)[first].abs().max())}


CASES: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "one token": functools.partial(_scan, num_tokens=1, initial=True),
    "quadratic, 63 tokens": functools.partial(_scan, num_tokens=63, chunk=None, final=False),
    "quadratic, final state": functools.partial(_scan, num_tokens=100, chunk=None, bias=-3.0),
    "quadratic, initial state": functools.partial(_scan, num_tokens=40, chunk=None, initial=True),
    "257 tokens": functools.partial(_scan, num_tokens=257, bias=-3.0, initial=True),
    "no final state": functools.partial(_scan, num_tokens=100, bias=-3.0, final=False),
    "several blocks": functools.partial(
        _scan, num_tokens=100, dims=(32, 16), bias=-3.0, initial=True
    ),
    "small blocks": functools.partial(
        _scan,
        num_tokens=70,
        dims=(16, 32),
        bias=-3.0,
        initial=True,
        sizes={"block": 32, "feature_block": 8, "state_width": 16},
    ),
    "default sizes of width 64": functools.partial(
        _scan, num_tokens=100, dims=(64, 64), bias=-3.0, sizes={"block": 64, "feature_block": 16}
    ),
    "grouped queries": functools.partial(
        _scan, num_tokens=70, heads=(2, 1, 1), bias=-3.0, initial=True
    ),
    "groups of values": functools.partial(
        _scan, num_tokens=70, heads=(1, 1, 2), bias=-3.0, initial=True
    ),
    "documents": functools.partial(
        _scan,
        num_tokens=150,
        starts=[[], [64, 128], [1, 20, 21, 70, 149]],
        initial=True,
        bias=-3.0,
    ),
    "quadratic, documents": functools.partial(
        _scan, num_tokens=90, starts=[[32, 64], [1, 20, 21, 70, 89]], chunk=None, bias=-3.0
    ),
    "without normalisation": functools.partial(
        _scan, num_tokens=90, starts=[[], [40, 70]], initial=True, bias=-3.0, normalize=False
    ),
    "very fast decay": functools.partial(_scan, num_tokens=90, hot=True, initial=True),
    "final state alone": functools.partial(_final_state, normalize=True),
    "final state alone, without normalisation": functools.partial(_final_state, normalize=False),
    "first output is first value": _first_output_is_first_value,
}
