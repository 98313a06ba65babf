"""The diffusion transformer of this project under a patch adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from trinity.core.dit_config import DiTConfig
from trinity.models.dit import DiffusionTransformer
from trinity.models.host_dit import DiTHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.nn.init import fill_normal

SHAPE = {
    "layer_pattern": "W-SE*E",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "route_scale": 1.0,
    "sliding_window": 5,
    "linear": {"head_dim": 8},
    "channels": 2,
    "num_classes": 3,
    "time_width": 8,
}


def _model(**more: object) -> DiffusionTransformer:
    config = DiTConfig(**(SHAPE | more))  # type: ignore[arg-type]
    model = DiffusionTransformer.initialized(config, seed=1)
    for name, parameter in model.named_parameters():
        fill_normal(parameter.data, 0.3, name)
    return model.eval()


def _latents(num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(num, 2, 16, 16), torch.linspace(0.2, 0.9, num), torch.arange(num) % 3


def test_scale_one_is_the_model_to_the_bit() -> None:
    model, (z, sigma_B, classes) = _model(), _latents()
    adapter = PatchAdapter(DiTHost(model), (1, 2, 4), lora_rank=2, residual_width=4)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter(z, sigma_B, classes, 2).sum().backward()
    assert torch.equal(adapter(z, sigma_B, classes, 1), model(z, sigma_B, classes))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is not None for p in adapter.part(2).parameters())


def test_coarse_patches_stand_where_the_models_own_large_ones_do() -> None:
    """A model with two patch sizes of its own, and the same weights under an adapter."""
    both, (z, sigma_B, classes) = _model(patch_scales=(1, 2)), _latents()
    one = _model()
    fits = {n: t for n, t in both.state_dict().items() if not n.endswith("scale_vectors")}
    one.load_state_dict(fits, strict=False)
    one.patch_embed.scale_vectors.data.copy_(both.patch_embed.scale_vectors[:1])  # type: ignore[union-attr]
    adapter = PatchAdapter(DiTHost(one), (1, 2), lora_rank=0, residual_width=0)
    part, own = adapter.part(2), both.patch_embed
    assert own is not None
    with torch.no_grad():
        part.embed_DP.copy_(own.embed[1].weight)
        part.embed_bias_D.copy_(own.embed[1].bias + own.scale_vectors[1] - own.scale_vectors[0])
        part.deembed_PD.copy_(both.patch_head.deembed[1].weight)  # type: ignore[union-attr]
        part.deembed_bias_P.copy_(both.patch_head.deembed[1].bias)  # type: ignore[union-attr]
    wanted = both(z, sigma_B, classes, scale=2)
    torch.testing.assert_close(adapter(z, sigma_B, classes, 2), wanted, rtol=1e-5, atol=1e-5)


def test_pooled_latents_are_spread_over_the_same_places() -> None:
    """Positions of a pooled latent are those of the pixels under it, not of a small image."""
    model, (z, sigma_B, classes) = _model(), _latents()
    host, small = DiTHost(model), z[..., :8, :8]
    spread = host.velocity(small, sigma_B, classes, spacing=2)
    assert spread.shape == small.shape
    assert not torch.allclose(spread, host.velocity(small, sigma_B, classes))
    assert torch.equal(spread, model(small, sigma_B, classes, edge=2, spacing=2))
