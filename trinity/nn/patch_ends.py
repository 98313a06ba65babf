"""The ends of a diffusion transformer: patches to tokens, condition to modulations, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.dit_config import DiTConfig
from trinity.core.runtime import autocast_disabled
from trinity.nn.modulation import NUM_MODULATIONS

MAX_PERIOD = 10_000.0
SIGMA_UNITS = 1000.0
"""Sigma from 0 to 1 is told to the sines in these units, as timesteps 0 to 1000 were."""


class PatchEmbed(nn.Module):
    """Patches of several sizes to tokens: a linear map for each, and a vector that tells the size.

    The vector is zero at first.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embed = nn.ModuleList(nn.Linear(values, width) for values in config.patch_values)
        self.scale_vectors = nn.Parameter(torch.empty(len(config.patch_scales), width))

    def forward(self, patches_BSP: Tensor, scale_BS: Tensor) -> Tensor:
        """(B, S, P) and the number of each patch's scale (B, S) to (B, S, D)."""
        x_BSD = by_scale(self.embed, patches_BSP, scale_BS)
        return x_BSD + F.embedding(scale_BS, self.scale_vectors).to(x_BSD.dtype)


class PatchHead(nn.Module):
    """Tokens to patches of several sizes; a linear map for each, all zero at first."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.deembed = nn.ModuleList(
            nn.Linear(config.hidden_size, values) for values in config.patch_values
        )

    def forward(
        self,
        x_BSD: Tensor,
        scale_BS: Tensor,
        targets_BSP: Tensor | None = None,
        share_BS: Tensor | None = None,
        weight_BS: Tensor | None = None,
    ) -> Tensor | FlowSums:
        """(B, S, D) to (B, S, P), zeros after the values of a small patch; with targets, sums of
        squared errors instead, in fp32 or wider (see :class:`trinity.core.batch.FlowBatch`)."""
        out_BSP = None
        # Of the weights, not of the modules: an adapter may have put others in their place.
        num_values = max(linear.weight.shape[0] for linear in _linears(self.deembed))
        for number, linear in enumerate(_linears(self.deembed)):
            part_BSP = linear(x_BSD)
            part_BSP = F.pad(part_BSP, (0, num_values - part_BSP.shape[-1]))
            mine_BSP = torch.where((scale_BS == number).unsqueeze(-1), part_BSP, 0)
            out_BSP = mine_BSP if out_BSP is None else out_BSP + mine_BSP
        assert out_BSP is not None
        if targets_BSP is None:
            return out_BSP
        assert share_BS is not None
        assert weight_BS is not None
        wide = torch.promote_types(out_BSP.dtype, torch.float32)
        error_BS = (out_BSP.to(wide) - targets_BSP.to(wide)).square().sum(-1)
        return FlowSums((error_BS * weight_BS).sum(), (error_BS.detach() * share_BS).sum())


class FlowSums(NamedTuple):
    """Squared errors of a microbatch: means over each image's elements, summed over images."""

    total: Tensor
    """Weighted; carries the gradient."""
    error: Tensor
    """Without weights."""


def by_scale(linears: nn.ModuleList, patches_BSP: Tensor, scale_BS: Tensor) -> Tensor:
    """Each patch through the linear map of its scale.

    Every map is applied to all and what is not asked for is dropped: a map costs little beside the
    blocks, and picking rows would wait for the device. Maps of patches larger than P are left out.
    """
    out_BSD = None
    for number, linear in enumerate(_linears(linears)):
        num_values = linear.weight.shape[1]
        if num_values > patches_BSP.shape[-1]:
            continue
        part_BSD = linear(patches_BSP[..., :num_values].to(linear.weight.dtype))
        mine_BSD = torch.where((scale_BS == number).unsqueeze(-1), part_BSD, 0)
        out_BSD = mine_BSD if out_BSD is None else out_BSD + mine_BSD
    assert out_BSD is not None
    return out_BSD


def _linears(modules: nn.ModuleList) -> Iterator[nn.Linear]:
    for module in modules:
        assert isinstance(module, nn.Linear)
        yield module


class ImageVectors(NamedTuple):
    """What the noise level and the condition of an image come to; N images a row."""

    time_BND: Tensor
    """Of the noise level alone."""
    modulation_BNMD: Tensor
    """Shared part of the blocks' six modulations."""
    final_BNMD: Tensor
    """Shift and scale before the head."""

    @staticmethod
    def from_positions(x_BSD: Tensor) -> ImageVectors:
        """Of the (B, 9 N, D) that travel through the stages behind the tokens."""
        x_BNMD = x_BSD.unflatten(1, (-1, NUM_VECTORS))
        time, modulation, final = x_BNMD.split((1, NUM_MODULATIONS, 2), dim=2)
        return ImageVectors(time.squeeze(2), modulation, final)


NUM_VECTORS = 1 + NUM_MODULATIONS + 2


class ImageCondition(nn.Module):
    """Noise level and condition of each image to the vectors that blocks and head are told.

    A class is a row of a table, with one more for no class; an embedding passes a linear map, and
    one that is all zero stands for none and gives a learned vector instead. The last layer is zero
    at first (adaLN-zero, arXiv 2212.09748).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.time_width = config.time_width
        self.time_in = nn.Linear(config.time_width, width)
        self.time_out = nn.Linear(width, width)
        self.classes = (
            nn.Embedding(config.num_classes + 1, width) if config.condition == "class" else None
        )
        self.embedding = self.no_embedding = None
        if config.condition == "embedding":
            self.embedding = nn.Linear(config.embedding_width, width)
            self.no_embedding = nn.Parameter(torch.empty(1, width))
        self.adaln_out = nn.Linear(width, (NUM_MODULATIONS + 2) * width)

    def forward(self, sigma_BN: Tensor, condition: Tensor) -> Tensor:
        """Sigmas (B, N), and classes (B, N) or embeddings (B, N, W), to the fields of
        :class:`ImageVectors` one after the other, (B, N, 9, D)."""
        with autocast_disabled(sigma_BN.device):
            wide = torch.promote_types(self.time_in.weight.dtype, torch.float32)
            waves = sigma_waves(sigma_BN, self.time_width).to(wide)
            time_BND = _linear(self.time_out, F.silu(_linear(self.time_in, waves)))
            vector_BND = time_BND
            if self.classes is not None:
                vector_BND = vector_BND + F.embedding(condition, self.classes.weight.to(wide))
            elif self.embedding is not None and self.no_embedding is not None:
                given_BN1 = (condition != 0).any(-1, keepdim=True)
                embedded_BND = _linear(self.embedding, condition.to(wide))
                vector_BND = vector_BND + torch.where(
                    given_BN1, embedded_BND, self.no_embedding.to(wide)
                )
            out = _linear(self.adaln_out, F.silu(vector_BND))
            out = out.unflatten(-1, (NUM_MODULATIONS + 2, -1))
            return torch.cat((time_BND.unsqueeze(2), out), dim=2)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def sigma_waves(sigma_BN: Tensor, width: int) -> Tensor:
    """Cosines and sines of sigma at ``width`` / 2 frequencies from 1 down to 1/10,000 per
    thousandth, (B, N, width), fp32 (Vaswani et al., arXiv 1706.03762)."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=sigma_BN.device) / half
    angles = (
        SIGMA_UNITS * sigma_BN.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponents)
    )
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
