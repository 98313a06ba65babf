"""Tiny diffusion transformers from diffusers, their hosts, and an adapter with weights in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trinity.models.host_flux import FluxCondition, FluxHost
from trinity.models.host_wan import WanCondition, WanHost
from trinity.models.patch_adapter import PatchAdapter

CHANNELS = 3
TEXT_WIDTH, POOLED_WIDTH, NUM_TEXT = 12, 10, 5


def tiny_flux(*, channels: int = CHANNELS, seed: int = 0, **config: Any) -> nn.Module:
    """FluxTransformer2DModel with one block of each kind, width 32."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    settings = {
        "in_channels": 4 * channels,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": POOLED_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**settings, **config}).eval()


def tiny_wan(*, channels: int = CHANNELS, seed: int = 0, **config: Any) -> nn.Module:
    """WanTransformer3DModel with two blocks, width 44."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 22,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**settings, **config}).eval()


def flux_condition(num_rows: int, *, guided: bool = False, seed: int = 1) -> FluxCondition:
    """Random embeddings of prompts."""
    torch.manual_seed(seed)
    return FluxCondition(
        torch.randn(num_rows, NUM_TEXT, TEXT_WIDTH),
        torch.randn(num_rows, POOLED_WIDTH),
        torch.rand(num_rows) if guided else None,
    )


def wan_condition(
    num_rows: int, *, seed: int = 1, dtype: torch.dtype = torch.float32
) -> WanCondition:
    """Random embeddings of prompts."""
    torch.manual_seed(seed)
    return WanCondition(torch.randn(num_rows, NUM_TEXT, TEXT_WIDTH).to(dtype))


def stirred(adapter: PatchAdapter, *, amount: float = 0.1, seed: int = 2) -> PatchAdapter:
    """The adapter with random numbers added to every weight, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(amount * noise.to(parameter.dtype))
    return adapter


def flux_adapter(**options: Any) -> tuple[PatchAdapter, nn.Module]:
    """An adapter that is no longer at its start, on a tiny Flux model; and that model."""
    base = tiny_flux()
    return stirred(PatchAdapter(FluxHost(base), **{"lora_rank": 3, **options})), base


def wan_adapter(**options: Any) -> tuple[PatchAdapter, nn.Module]:
    """The same on a tiny Wan model."""
    base = tiny_wan()
    return stirred(PatchAdapter(WanHost(base), **{"lora_rank": 3, **options})), base


def images(num_rows: int, edge: int = 16, *, channels: int = CHANNELS, seed: int = 3) -> Tensor:
    """Random latents (B, C, H, W), wider than high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, channels, edge, edge + 8, generator=generator)


def videos(num_rows: int, edge: int = 16, *, frames: int = 3, seed: int = 3) -> Tensor:
    """Random latents (B, C, T, H, W), wider than high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, CHANNELS, frames, edge, edge + 8, generator=generator)
