"""Causal convolution: widths, ragged shapes, documents shorter than the kernel, a carried halo."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from trinity_kernels import causal_conv
from trinity_kernels.reference import causal_conv_reference

from tests.kernels.harness import Errors, Maker, compare


def _conv(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    width: int,
    num_channels: int = 20,
    starts: list[list[int]] | None = None,
    bias: bool = True,
    initial: bool = True,
    activation: str | None = "silu",
) -> Errors:
    batch = len(starts) if starts else 2
    make = Maker(num_tokens + width, device, dtype)
    leaves = {
        "x_BSC": make.normal(batch, num_tokens, num_channels),
        "weight_Cw": make.normal(num_channels, width),
    }
    if bias:
        leaves["bias_C"] = make.normal(num_channels)
    if initial:
        leaves["initial_BwC"] = make.normal(batch, width - 1, num_channels)
    documents = make.documents(starts, num_tokens) if starts else None
    shared = {"document_ids_BS": documents, "activation": activation}
    return compare(
        lambda **leaves: (causal_conv(**leaves, **shared),),
        lambda **leaves: (causal_conv_reference(**leaves, **shared),),
        leaves,
    )


CASES: dict[str, Callable[[torch.device, torch.dtype], Errors]] = {
    "one token": functools.partial(_conv, num_tokens=1, width=4),
    "two taps, no activation": functools.partial(_conv, num_tokens=63, width=2, activation=None),
    "three taps, bare": functools.partial(
        _conv, num_tokens=100, width=3, bias=False, initial=False
    ),
    "four taps, many channels": functools.partial(_conv, num_tokens=33, width=4, num_channels=130),
    "documents": functools.partial(
        _conv, num_tokens=70, width=4, starts=[[], [1, 2, 5], [31, 32, 33, 64, 69]]
    ),
    "documents, linear": functools.partial(
        _conv, num_tokens=40, width=3, starts=[[2], [1, 30, 39]], activation=None
    ),
}
