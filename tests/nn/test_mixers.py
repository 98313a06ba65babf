"""Linear-time mixers against their papers' equations, written out; documents, caches, types."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.model_config import PRESETS, ModelConfig
from trinity.models.caches import ForgettingCache, StateCache
from trinity.nn.block import build_mixer
from trinity.nn.init import initialize
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.mamba2 import Mamba2

TYPES = ["mamba2", *PRESETS]


def _config(**values: Any) -> ModelConfig:
    shape = {
        "vocab_size": 32,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "route_scale": 1.0,
        "sliding_window": 8,
        "mamba2": {"head_dim": 8, "state_dim": 6, "num_groups": 2},
        "linear": {"head_dim": 6},
        "layer_types": ["2mamba"],
    }
    return ModelConfig.model_validate(shape | values)


def _mixer(config: ModelConfig) -> Any:
    """Initialised, then moved off the special values (biases, gains) of the initialisation."""
    mixer = build_mixer(config, 0)
    assert mixer is not None
    initialize(nn.ModuleDict({"mixer": mixer}), weight_std=0.3, num_layers=1, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return mixer.double()


def _x(length: int = 37, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 24, generator=generator, dtype=torch.float64)


def _conv(conv: nn.Module | None, x_BSC: Tensor) -> Tensor:
    if conv is None:
        return x_BSC
    weight_Cw, channels = conv.weight, x_BSC.shape[-1]
    padded = F.pad(x_BSC.mT, (weight_Cw.shape[1] - 1, 0))
    return F.conv1d(padded, weight_Cw[:, None], conv.bias, groups=channels).mT


def _weights(log_decay_BSH: Tensor) -> Tensor:
    """exp of the sums between two tokens, (B, H, S, S), lower triangle."""
    sums = log_decay_BSH.transpose(1, 2).cumsum(-1)
    log = sums[..., :, None] - sums[..., None, :]
    return log.masked_fill(torch.ones_like(log, dtype=torch.bool).triu(1), -torch.inf).exp()


def _by_equations(mixer: LinearMixer, x: Tensor, layer_type: str) -> Tensor:
    """Algorithms 4 and 5 and section 6 of arXiv 2602.17363, as they stand there."""

    def heads(proj: nn.Linear, conv: nn.Module | None) -> Tensor:
        return _conv(conv, proj(x)).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)

    q, k, v = (
        heads(mixer.q_proj, mixer.q_conv),
        heads(mixer.k_proj, mixer.k_conv),
        heads(mixer.v_proj, mixer.v_conv),
    )
    decay = _weights(-F.softplus(x @ mixer.rates.decay_weight.T))
    scores = q @ k.mT / mixer.head_dim**0.5
    if layer_type == "mamba2s":
        dt = F.softplus(x @ mixer.rates.dt_weight.T).transpose(1, 2)
        o = (scores * decay) @ (v * dt[..., None])
        o = o.transpose(1, 2).flatten(2)
        assert mixer.out_norm is not None
        o = o / (o.square().mean(-1, keepdim=True) + mixer.out_norm.eps).sqrt()
        return mixer.o_proj(o * mixer.out_norm.weight)
    p = (scores.square() if layer_type == "2mamba" else scores.exp()) * decay
    o = (p @ v) / p.sum(-1, keepdim=True)
    return mixer.o_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("layer_type", PRESETS)
def test_presets_follow_their_equations(layer_type: str, length: int) -> None:
    mixer = _mixer(_config(layer_types=[layer_type]))
    x = _x(length)
    torch.testing.assert_close(mixer(x), _by_equations(mixer, x, layer_type), rtol=1e-9, atol=1e-10)


def test_mamba2_follows_its_equations() -> None:
    mixer = _mixer(_config(layer_types=["mamba2"]))
    assert isinstance(mixer, Mamba2)
    x = _x()
    q, k, v = (
        F.silu(_conv(conv, proj(x)))
        for proj, conv in (
            (mixer.q_proj, mixer.q_conv),
            (mixer.k_proj, mixer.k_conv),
            (mixer.v_proj, mixer.v_conv),
        )
    )
    dt = F.softplus(x @ mixer.rates.dt_weight.T + mixer.rates.dt_bias)
    decay = _weights(-mixer.rates.A_log.exp() * dt)
    per_group = dt.shape[-1] // 2
    c, b = (
        t.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(per_group, dim=1) for t in (q, k)
    )
    heads = v.unflatten(-1, (-1, 8)).transpose(1, 2)
    y = (c @ b.mT * decay) @ (heads * dt.transpose(1, 2)[..., None])
    y = y + mixer.skip.weight[:, None, None] * heads
    y = (y.transpose(1, 2).flatten(2) * F.silu(mixer.gate_proj(x))).unflatten(-1, (2, -1))
    y = y / (y.square().mean(-1, keepdim=True) + mixer.out_norm.eps).sqrt()
    expected = mixer.o_proj(y.flatten(2) * mixer.out_norm.weight)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer_type", TYPES)
def test_documents_are_apart(layer_type: str) -> None:
    mixer = _mixer(_config(layer_types=[layer_type]))
    x, starts = _x(50, 1), [0, 1, 17, 18, 40, 50]
    ids = torch.zeros(1, 50, dtype=torch.int64)
    for start in starts[1:-1]:
        ids[:, start:] += 1
    packed = mixer(x, None, ids)
    apart = [mixer(x[:, a:b]) for a, b in itertools.pairwise(starts)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layer_type", TYPES)
def test_prefill_in_pieces_equals_the_whole(layer_type: str, kv_heads: int) -> None:
    mixer = _mixer(
        _config(layer_types=[layer_type], linear={"head_dim": 6, "num_kv_heads": kv_heads})
    )
    x = _x(45)
    is_attention = isinstance(mixer, LinearMixer) and mixer.is_attention
    cache = ForgettingCache() if is_attention else StateCache()
    outs = [mixer(piece, None, None, cache) for piece in x.split([20, 1, 2, 1, 1, 20], dim=1)]
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x), rtol=1e-9, atol=1e-10)


def test_options_are_independent() -> None:
    options: list[dict[str, Any]] = [
        {"decay": "none", "conv_width": 1, "value_dt": False, "power": 1, "norm": "rms"},
        {"decay": "mamba2", "value_dt": False, "power": 1, "norm": "rms"},
        {"power": 2, "norm": "rms", "qk_norm": True},
        {"power": 2, "norm": "sum", "value_dt": True, "decay_bias": "log_spaced"},
        {"power": 1, "norm": "rms", "norm_groups": 4, "conv_bias": False, "conv_width": 4},
    ]
    outs = []
    for linear in options:
        mixer = _mixer(_config(linear={"head_dim": 6, **linear}))
        out = mixer(_x())
        out.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in mixer.parameters()), linear
        outs.append(out.detach())
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(outs))


def test_initial_rates() -> None:
    config = _config(
        hidden_size=512,
        layer_types=["mamba2"],
        mamba2={"head_dim": 8, "state_dim": 6},
    )
    mixer = build_mixer(config, 0)
    assert isinstance(mixer, Mamba2)
    initialize(nn.ModuleDict({"mixer": mixer}), weight_std=0.02, num_layers=1, seed=0)
    steps = F.softplus(mixer.rates.dt_bias.detach())
    assert 1e-3 <= float(steps.min()) < 2e-3 < 5e-2 < float(steps.max()) <= 1e-1
    rates = mixer.rates.A_log.detach().exp()
    assert 1 <= float(rates.min()) < 2 < 15 < float(rates.max()) <= 16
    assert torch.equal(mixer.skip.weight, torch.ones(128))
    bound = 4**-0.5
    assert bound * 0.95 < float(mixer.v_conv.weight.detach().abs().max()) <= bound
    linear = build_mixer(_config(linear={"head_dim": 6, "decay_bias": "log_spaced"}), 0)
    initialize(nn.ModuleDict({"mixer": linear}), weight_std=0.02, num_layers=1, seed=0)
    half_lives = 0.6931472 / F.softplus(linear.rates.decay_bias.detach())
    torch.testing.assert_close(
        half_lives, torch.tensor([1.0, 10.0, 100.0, 1000.0]), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("layer_type", TYPES)
def test_rates_are_exact_under_autocast(layer_type: str) -> None:
    mixer = _mixer(_config(layer_types=[layer_type])).float()
    x = _x().float()
    num_heads = 6 if layer_type == "mamba2" else 4
    exact = mixer.rates(x, num_heads).log_decay_BSU
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.rates(x, num_heads).log_decay_BSU, exact)
        out = mixer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), mixer(x), rtol=0.1, atol=0.1)
