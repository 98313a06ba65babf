"""Every initialisation rule of the backbone, in one table.

Each tensor is drawn in slabs, an expert or some rows at a time, each from a generator of its own
seeded by (seed, name, slab). So the values do not depend on the order of construction, on the
layout, or on which other tensors exist, and a rank draws only the slabs it holds a part of.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trinity.core.sharding import local_region, local_tensor
from trinity.nn.conv import ShortConv
from trinity.nn.norm import post_norm_gain

TRUNCATION_STDS = 3.0
SLAB_ROWS = 256
"""Rows of a matrix that are drawn together. Part of what a seed means: never change it."""
SMALLEST_STEP, LARGEST_STEP = 1e-3, 1e-1
LONGEST_HALF_LIFE = 1000.0
"""Tokens."""
ZERO_PARAMETERS = frozenset({"bias", "modulation", "time_weight", "scale_vectors"})
"""Last parts of names; convolutions' biases have a rule of their own."""
ZERO_MODULES = frozenset({"adaln_out", "deembed"})
"""Parts of names of modules all of whose parameters start at zero."""


Sampler = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Draws the values of a slab."""


def initialize(model: nn.Module, *, weight_std: float, num_layers: int, seed: int) -> None:
    """Fill every parameter and buffer in place (report, eqs. 34-38).

    Matrices and embeddings: normal with ``weight_std``, cut at three standard deviations. Norm
    gains: 1, except those that close a branch, which start at 1/sqrt(num_layers). Convolutions:
    uniform in +-1/sqrt(width). Steps and decays of Mamba-2: as its authors do. Balancing state,
    and biases other than those of convolutions: zero.

    Zero is also most of what a diffusion transformer adds: the weights of reverse scans, so that a
    mixer computes at first what it does in a language model; the modulations, so that a block is
    the identity; the noise level's part in routing; what tells the sizes of patches apart; and what
    predicts velocities.
    """
    widths = {
        f"{name}.{kind}": module.width
        for name, module in model.named_modules()
        if isinstance(module, ShortConv)
        for kind in ("weight", "bias")
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if name in widths:
                _fill(parameter, _uniform(widths[name] ** -0.5), f"{seed}/{name}")
            elif last in RATES:
                _fill(parameter, RATES[last], f"{seed}/{name}")
            elif _starts_at_zero(name):
                local_tensor(parameter).zero_()
            elif parameter.ndim == 1:
                gain = post_norm_gain(num_layers) if _closes_a_branch(name) else 1.0
                local_tensor(parameter).fill_(gain)
            else:
                _fill(parameter, _truncated_normal(weight_std), f"{seed}/{name}")
        for _, buffer in model.named_buffers():
            buffer.zero_()


def _starts_at_zero(name: str) -> bool:
    *modules, last = name.split(".")
    is_reverse_scale = modules[-1:] == ["reverse"] and last == "scale"
    return is_reverse_scale or last in ZERO_PARAMETERS or not ZERO_MODULES.isdisjoint(modules)


def _closes_a_branch(name: str) -> bool:
    return name.endswith("_post_norm.weight")


def fill_normal(parameter: Tensor, std: float, key: str) -> None:
    """Fill what is here of a tensor with truncated normal values that ``key`` determines."""
    _fill(parameter, _truncated_normal(std), key)


def _fill(parameter: Tensor, sampler: Sampler, key: str) -> None:
    """Fill what is here of a tensor (rows first); a stack of matrices has one slab per matrix, a
    vector is one slab."""
    local, region = local_tensor(parameter), local_region(parameter)
    slab_rows = {1: parameter.shape[0], 2: SLAB_ROWS}.get(parameter.ndim, 1)
    rows = region[0]
    for slab in range(rows.start // slab_rows, -(-rows.stop // slab_rows)):
        first, last = slab * slab_rows, min((slab + 1) * slab_rows, parameter.shape[0])
        # Drawn on the CPU whatever the device: the same numbers everywhere.
        values = sampler((last - first, *parameter.shape[1:]), _generator(f"{key}/{slab}"))
        start, stop = max(first, rows.start), min(last, rows.stop)
        if start < stop:
            part = values[(slice(start - first, stop - first), *region[1:])]
            local[start - rows.start : stop - rows.start].copy_(part)


def _truncated_normal(std: float) -> Sampler:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bound = TRUNCATION_STDS * std
        return nn.init.trunc_normal_(
            torch.empty(shape), std=std, a=-bound, b=bound, generator=generator
        )

    return draw


def _uniform(bound: float) -> Sampler:
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _rate_exponents(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A_log: rates uniform in 1 .. 16."""
    return torch.empty(shape).uniform_(1, 16, generator=generator).log_()


def _step_biases(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """dt_bias: steps log-uniform in 0.001 .. 0.1 where the projection is zero."""
    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
    return _softplus_inverse(torch.empty(shape).uniform_(low, high, generator=generator).exp_())


def _decay_biases(shape: tuple[int, ...], _generator: torch.Generator) -> Tensor:
    """decay_bias: half-lives log-spaced over the heads where the projection is zero."""
    half_lives = torch.logspace(0, math.log10(LONGEST_HALF_LIFE), shape[0])
    return _softplus_inverse(math.log(2) / half_lives)


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


RATES: dict[str, Sampler] = {
    "A_log": _rate_exponents,
    "dt_bias": _step_biases,
    "decay_bias": _decay_biases,
}


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
