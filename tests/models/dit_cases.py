"""A small diffusion transformer with every mixer, for tests in fp64."""

from __future__ import annotations

import torch

from trinity.core.dit_config import DiTConfig
from trinity.models.dit import DiffusionTransformer
from trinity.nn.init import fill_normal

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "route_scale": 1.5,
    "sliding_window": 5,
    "mamba2": {"head_dim": 8, "state_dim": 8, "conv_width": 3},
    "linear": {"head_dim": 8},
}
PATTERN = "W-MESE2EXE*E"
IMAGE = {"channels": 2, "patch_size": 2, "patch_scales": (1, 2), "num_classes": 3, "time_width": 8}
CONFIG = DiTConfig(layer_pattern=PATTERN, **SHAPE, **IMAGE)  # type: ignore[arg-type]


def fp64_model(config: DiTConfig = CONFIG, *, stirred: bool = True) -> DiffusionTransformer:
    model = DiffusionTransformer.initialized(config, seed=3).double()
    for moe in model.moe_layers():
        moe.router.float_state()
    if stirred:
        stir(model)
    return model


def stir(model: torch.nn.Module) -> None:
    """Move all weights away from where they start, which is the identity before a head of zeros."""
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        fill_normal(parameter.data, 0.3, name)
        parameter.data.add_(before)
