"""Every initialisation rule of the backbone, in one table.

Each tensor draws from a generator of its own, seeded by (seed, name), so that the values do not
depend on the order of construction, on the layout, or on which other tensors exist.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from trinity.nn.norm import post_norm_gain

TRUNCATION_STDS = 3.0


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
                parameter.fill_(gain)
            else:
                _truncated_normal(parameter, weight_std, _generator(seed, name))
        for _, buffer in model.named_buffers():
            buffer.zero_()


def _closes_a_branch(name: str) -> bool:
    return name.endswith("_post_norm.weight")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _truncated_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn on the CPU whatever the device: the same numbers everywhere.
    values = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.trunc_normal_(
        values, std=std, a=-TRUNCATION_STDS * std, b=TRUNCATION_STDS * std, generator=generator
    )
    parameter.copy_(values)
