"""Every initialisation rule of the backbone, in one table.

Each tensor is drawn in slabs, an expert or some rows at a time, each from a generator of its own
seeded by (seed, name, slab). So the values do not depend on the order of construction, on the
layout, or on which other tensors exist, and a rank draws only the slabs it holds a part of.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from trinity.core.sharding import local_region, local_tensor
from trinity.nn.norm import post_norm_gain

TRUNCATION_STDS = 3.0
SLAB_ROWS = 256
"""Rows of a matrix that are drawn together. Part of what a seed means: never change it."""


def initialize(model: nn.Module, *, weight_std: float, num_layers: int, seed: int) -> None:
    """Fill every parameter and buffer in place (report, eqs. 34-38).

    Matrices and embeddings: normal with ``weight_std``, cut at three standard deviations. Norm
    gains: 1, except those that close a branch, which start at 1/sqrt(num_layers). Balancing
    state: zero.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                gain = post_norm_gain(num_layers) if _closes_a_branch(name) else 1.0
                local_tensor(parameter).fill_(gain)
            else:
                _truncated_normal(parameter, weight_std, f"{seed}/{name}")
        for _, buffer in model.named_buffers():
            buffer.zero_()


def _closes_a_branch(name: str) -> bool:
    return name.endswith("_post_norm.weight")


def _truncated_normal(parameter: Tensor, std: float, key: str) -> None:
    """Fill what is here of a tensor (rows first); a stack of matrices has one slab per matrix."""
    local, region = local_tensor(parameter), local_region(parameter)
    slab_rows = 1 if parameter.ndim > 2 else SLAB_ROWS
    rows = region[0]
    for slab in range(rows.start // slab_rows, -(-rows.stop // slab_rows)):
        first, last = slab * slab_rows, min((slab + 1) * slab_rows, parameter.shape[0])
        # Drawn on the CPU whatever the device: the same numbers everywhere.
        values = torch.empty(last - first, *parameter.shape[1:], dtype=torch.float32)
        nn.init.trunc_normal_(
            values,
            std=std,
            a=-TRUNCATION_STDS * std,
            b=TRUNCATION_STDS * std,
            generator=_generator(f"{key}/{slab}"),
        )
        start, stop = max(first, rows.start), min(last, rows.stop)
        if start < stop:
            part = values[(slice(start - first, stop - first), *region[1:])]
            local[start - rows.start : stop - rows.start].copy_(part)


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
