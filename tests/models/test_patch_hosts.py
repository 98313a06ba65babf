"""Flux and Wan as hosts: the model itself at scale 1, a model of larger patches at the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.patch_cases import (
    CHANNELS,
    flux_adapter,
    flux_condition,
    images,
    stirred,
    tiny_flux,
    tiny_wan,
    videos,
    wan_adapter,
    wan_condition,
)
from trinity.core.errors import ConfigError
from trinity.models.host_flux import FluxHost
from trinity.models.host_wan import WanHost, rotary_tables
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patching import patch_centres, pool_snr_matched

SIGMA_B = torch.tensor([0.9, 0.3])


def _flux_arguments(tokens: Tensor, condition: Any, sigma_B: Tensor, ids: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": tokens,
        "timestep": sigma_B,
        "encoder_hidden_states": condition.prompt_BSD.to(tokens),
        "pooled_projections": condition.pooled_BD.to(tokens),
        "guidance": condition.guidance_B,
        "img_ids": ids,
        "txt_ids": torch.zeros(condition.prompt_BSD.shape[1], 3),
        "return_dict": False,
    }


def _as_pipeline(z: Tensor, condition: Any, sigma_B: Tensor = SIGMA_B) -> dict[str, Any]:
    """Arguments of a Flux model, with the pipeline's own packing and positions."""
    from diffusers import FluxPipeline

    batch, channels, height, width = z.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", z.dtype)
    tokens = FluxPipeline._pack_latents(z, batch, channels, height, width)
    return _flux_arguments(tokens, condition, sigma_B, ids)


def _unpacked(output: Tensor, z: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(output, z.shape[-2] * 8, z.shape[-1] * 8, 8)


def _gradients(velocity: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, velocity.numel()).view_as(velocity).to(velocity)
    return torch.autograd.grad((velocity * weights).sum(), inputs)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_at_scale_one_is_the_model_to_the_bit(guided: bool) -> None:
    """Also after coarse calls, beside an adapter with weights in it, and in the gradient."""
    base = tiny_flux(guidance_embeds=guided)
    adapter = stirred(PatchAdapter(FluxHost(base), lora_rank=3))
    condition = flux_condition(2, guided=guided)
    z = images(2).requires_grad_()
    adapter(z, SIGMA_B, condition, 2).sum().backward()
    got = adapter(z, SIGMA_B, condition, 1)
    expected = _unpacked(base(**_as_pipeline(z, condition))[0], z)
    assert torch.equal(got, expected)
    assert torch.equal(_gradients(got, [z])[0], _gradients(expected, [z])[0])


def test_wan_at_scale_one_is_the_model_to_the_bit() -> None:
    adapter, base = wan_adapter()
    condition = wan_condition(2)
    z = videos(2).requires_grad_()
    adapter(z, SIGMA_B, condition, 4).sum().backward()
    got = adapter(z, SIGMA_B, condition, 1)
    timestep = (1000 * SIGMA_B.double()).float()
    expected = base(z, timestep, condition.prompt_BSD, return_dict=False)[0]
    assert torch.equal(got, expected)
    assert torch.equal(_gradients(got, [z])[0], _gradients(expected, [z])[0])


def test_coarse_calls_leave_the_model_as_it_was() -> None:
    for (adapter, base), z, condition in (
        (flux_adapter(), images(2), flux_condition(2)),
        (wan_adapter(), videos(2), wan_condition(2)),
    ):
        before = {name: (p, p.clone()) for name, p in base.named_parameters()}
        keys = {name: sorted(vars(module)) for name, module in base.named_modules()}
        adapter(z, SIGMA_B, condition, 2)
        for name, parameter in base.named_parameters():
            assert parameter is before[name][0], name
            assert torch.equal(parameter, before[name][1]), name
        for name, module in base.named_modules():
            assert not module._forward_hooks, name
            assert sorted(vars(module)) == keys[name], name


def test_a_coarse_call_that_fails_leaves_the_model_as_it_was() -> None:
    for (adapter, base), z, condition, inner in (
        (flux_adapter(), images(2), flux_condition(2), "single_transformer_blocks.0"),
        (wan_adapter(), videos(2), wan_condition(2), "blocks.1"),
    ):
        parameters = dict(base.named_parameters())

        def fails(*_: Any) -> None:
            raise RuntimeError("in the middle")

        handle = base.get_submodule(inner).register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            adapter(z, SIGMA_B, condition, 2)
        handle.remove()
        assert all(parameters[name] is p for name, p in base.named_parameters())
        assert not any(module._forward_hooks for module in base.modules())
        adapter(z, SIGMA_B, condition, 4)  # and another scale can be attached


def _merged(wide: nn.Module, base: nn.Module, adapter: PatchAdapter, scale: int) -> dict[str, Any]:
    """Weights for ``wide``, built for larger patches: the base's, with LoRA multiplied out."""
    part = adapter.part(scale)
    state: dict[str, Tensor] = dict(base.state_dict())
    for name, addition in part.low_rank():
        state[f"{name}.weight"] = state[f"{name}.weight"] + addition.up_MR @ addition.down_RN
    embed = "x_embedder" if "x_embedder.weight" in state else "patch_embedding"
    shape = wide.state_dict()[f"{embed}.weight"].shape
    state[f"{embed}.weight"] = part.embed_DP.view(shape)
    state[f"{embed}.bias"] = part.embed_bias_D + part.size_D
    state["proj_out.weight"], state["proj_out.bias"] = part.deembed_PD, part.deembed_bias_P
    return state


def _residual(adapter: PatchAdapter, scale: int, z: Tensor) -> Tensor:
    """The residual path, frame by frame, by plain convolutions."""
    path = adapter.part(scale).residual
    assert path is not None
    rows = []
    for row, sigma in zip(z, SIGMA_B, strict=True):
        frames = row.movedim(1, 0) if row.ndim == 4 else row[None]
        x = torch.cat([frames, torch.full_like(frames[:, :1], float(sigma))], 1)
        x = F.silu(F.conv2d(x, path.conv_in.weight, path.conv_in.bias, padding=1))
        x = F.conv2d(x, path.conv_out.weight, path.conv_out.bias, padding=1)
        rows.append(x.movedim(0, 1) if row.ndim == 4 else x[0])
    return torch.stack(rows)


def _assert_equal_with_gradients(
    adapter: PatchAdapter, scale: int, got: Tensor, expected: Tensor, z: Tensor
) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    named = dict(adapter.part(scale).named_parameters())
    inputs = [z, *named.values()]
    pairs = zip(_gradients(got, inputs), _gradients(expected, inputs), strict=True)
    for name, (own, reference) in zip(["z", *named], pairs, strict=True):
        assert reference.abs().sum() > 0, name
        torch.testing.assert_close(own, reference, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("scale", [2, 4])
def test_coarse_flux_is_a_flux_model_of_larger_patches(scale: int) -> None:
    """Reference: another model of the library, built for wider tokens, at fractional positions."""
    adapter, base = flux_adapter()
    adapter, base, size = adapter.double(), base.double(), 2 * scale
    wide = tiny_flux(in_channels=CHANNELS * size**2).double()
    z, grid = images(2).double().requires_grad_(), (16 // size, 24 // size)
    tokens = F.unfold(z, size, stride=size).mT  # (C, row, column) inside a token
    ids = torch.cat([torch.zeros(tokens.shape[1], 1), patch_centres(grid, scale)], 1)
    arguments = _flux_arguments(tokens, flux_condition(2), SIGMA_B, ids)
    state = _merged(wide, base, adapter, scale)
    output = torch.func.functional_call(wide, state, (), arguments)[0]
    expected = F.fold(output.mT, z.shape[-2:], size, stride=size) + _residual(adapter, scale, z)
    got = adapter(z, SIGMA_B, flux_condition(2), scale)
    _assert_equal_with_gradients(adapter, scale, got, expected, z)


@pytest.mark.parametrize(("scale", "patch_frames"), [(2, 1), (4, 1), (2, 2)])
def test_coarse_wan_is_a_wan_model_of_larger_patches(scale: int, patch_frames: int) -> None:
    """Reference: another model of the library, whose configuration names the larger patch."""
    size = 2 * scale
    base = tiny_wan(patch_size=(patch_frames, 2, 2)).double()
    adapter = stirred(PatchAdapter(WanHost(base), lora_rank=3))
    wide: Any = tiny_wan(patch_size=(patch_frames, size, size)).double()
    z = videos(2, frames=2 * patch_frames).double().requires_grad_()
    grid, condition = (2, 16 // size, 24 // size), wan_condition(2, dtype=torch.float64)
    cosines, sines = rotary_tables(patch_centres(grid, scale), (10, 6, 6))
    wide.rope.forward = lambda _: (cosines[None, :, None], sines[None, :, None])
    arguments = (z, (1000 * SIGMA_B.double()).float(), condition.prompt_BSD)
    state = _merged(wide, base, adapter, scale)
    output = torch.func.functional_call(wide, state, arguments, {"return_dict": False})[0]
    got = adapter(z, SIGMA_B, condition, scale)
    _assert_equal_with_gradients(adapter, scale, got, output + _residual(adapter, scale, z), z)


def test_rotary_tables_are_the_models_and_turn_half_way_at_half_positions() -> None:
    rope: Any = tiny_wan().rope
    whole = patch_centres((7, 7, 7), 1)
    cosines, sines = rotary_tables(whole, (rope.t_dim, rope.h_dim, rope.w_dim))
    for own, table in zip((cosines, sines), (rope.freqs_cos, rope.freqs_sin), strict=True):
        axes = table.split((rope.t_dim, rope.h_dim, rope.w_dim), dim=1)
        expected = [axis[whole[:, x].long()] for x, axis in enumerate(axes)]
        assert torch.equal(own, torch.cat(expected, dim=1))
    half_cosines, half_sines = rotary_tables(whole / 2, (rope.t_dim, rope.h_dim, rope.w_dim))
    torch.testing.assert_close(half_cosines**2 - half_sines**2, cosines, rtol=0, atol=1e-6)
    torch.testing.assert_close(2 * half_sines * half_cosines, sines, rtol=0, atol=1e-6)


def test_a_pooled_latent_runs_on_the_models_own_patches_at_spaced_positions() -> None:
    flux, wan = tiny_flux(), tiny_wan()
    pooled = pool_snr_matched(images(2), SIGMA_B, 2)
    ids = torch.cat([torch.zeros(24, 1), patch_centres((4, 6), 2)], 1)
    arguments = _as_pipeline(pooled.latent, flux_condition(2), pooled.sigma_B) | {"img_ids": ids}
    expected = _unpacked(flux(**arguments)[0], pooled.latent)
    got = FluxHost(flux).velocity(pooled.latent, pooled.sigma_B, flux_condition(2), spacing=2)
    assert torch.equal(got, expected)

    pooled = pool_snr_matched(videos(2), SIGMA_B, 2)
    got = WanHost(wan).velocity(pooled.latent, pooled.sigma_B, wan_condition(2), spacing=2)
    other: Any = wan
    cosines, sines = rotary_tables(patch_centres((3, 4, 6), 2), (10, 6, 6))
    other.rope.forward = lambda _: (cosines[None, :, None], sines[None, :, None])
    timestep = (1000 * pooled.sigma_B.double()).float()
    prompt_BSD = wan_condition(2).prompt_BSD
    expected = other(pooled.latent, timestep, prompt_BSD, return_dict=False)[0]
    assert torch.equal(got, expected)


def test_calls_of_the_pipelines_are_read_and_answered_in_their_form() -> None:
    z, condition = images(2), flux_condition(2, guided=True)
    host = FluxHost(tiny_flux(guidance_embeds=True))
    arguments = _as_pipeline(z, condition) | {"joint_attention_kwargs": {}}
    call = host.read_call(arguments)
    assert torch.equal(call.z, z)
    assert torch.equal(call.sigma_B.float(), SIGMA_B)
    assert torch.equal(host.write_sample(z), arguments["hidden_states"])
    velocity = host.velocity(*call)
    assert torch.equal(host.write_sample(velocity), host.base(**arguments)[0])

    wan = WanHost(tiny_wan())
    steps = torch.linspace(0.3, 999.9, 997)
    timestep = steps[steps / 1000 * 1000 != steps][[0, -1]]  # rounded away in float32
    arguments = {"hidden_states": videos(2), "timestep": timestep}
    call = wan.read_call(arguments | {"encoder_hidden_states": wan_condition(2).prompt_BSD})
    expected = wan.base(videos(2), timestep, wan_condition(2).prompt_BSD, return_dict=False)[0]
    assert torch.equal(wan.velocity(*call), expected)


def test_all_feed_forward_linears_of_image_tokens_are_named() -> None:
    flux, wan = tiny_flux(num_layers=2, num_single_layers=2), tiny_wan()
    for base, host, kinds in (
        (flux, FluxHost(flux), (".ff.net.0.proj", ".ff.net.2", ".proj_mlp", "blocks.0.proj_out")),
        (wan, WanHost(wan), (".ffn.net.0.proj", ".ffn.net.2")),
    ):
        linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        expected = {
            name for name in linears if name.replace("blocks.1", "blocks.0").endswith(kinds)
        }
        assert len(expected) == {flux: 8, wan: 4}[base]
        assert host.feed_forward() == {name: linears[name] for name in expected}


def test_rows_of_a_condition() -> None:
    rows_N = torch.tensor([2, 0])
    condition = flux_condition(3, guided=True)
    taken = FluxHost(tiny_flux()).take(condition, rows_N)
    for name in ("prompt_BSD", "pooled_BD", "guidance_B"):
        assert torch.equal(getattr(taken, name), getattr(condition, name)[[2, 0]])
    scaled = replace(condition, attention_kwargs={"scale": 0.5})
    host = FluxHost(tiny_flux())
    assert host.take(scaled, rows_N).attention_kwargs == {"scale": 0.5}
    adapted = replace(condition, attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(3, 1)]})
    assert host.take(adapted, torch.arange(3)).attention_kwargs is not None
    with pytest.raises(ConfigError, match="ip_adapter_image_embeds"):
        host.take(adapted, rows_N)
    video = wan_condition(3)
    taken = WanHost(tiny_wan()).take(replace(video, image_BSD=video.prompt_BSD + 1), rows_N)
    assert torch.equal(taken.prompt_BSD, video.prompt_BSD[[2, 0]])
    assert torch.equal(taken.image_BSD, video.prompt_BSD[[2, 0]] + 1)


def test_mistakes_are_told() -> None:
    flux, wan = tiny_flux(), tiny_wan()
    with pytest.raises(ConfigError, match="WanTransformer3DModel, not a FluxTransformer2DModel"):
        FluxHost(wan)
    with pytest.raises(ConfigError, match="FluxTransformer2DModel, not a Wan"):
        WanHost(flux)
    with pytest.raises(ConfigError, match="fill, depth"):
        FluxHost(tiny_flux(in_channels=24, out_channels=12))
    with pytest.raises(ConfigError, match="square"):
        WanHost(tiny_wan(patch_size=(1, 2, 4)))
    other: Any = tiny_wan()
    other.rope = type(other.rope)(22, (1, 2, 2), 64, theta=500.0)
    with pytest.raises(ConfigError, match="rotary"):
        WanHost(other)
    arguments = _as_pipeline(images(2), flux_condition(2))
    twice = {key: torch.cat([arguments[key]] * 2, -2) for key in ("hidden_states", "img_ids")}
    with pytest.raises(ConfigError, match="192 tokens at img_ids"):
        FluxHost(flux).read_call(arguments | twice)
    with pytest.raises(ConfigError, match="control net"):
        FluxHost(flux).read_call(arguments | {"controlnet_block_samples": []})
    per_token = {"hidden_states": videos(1), "timestep": torch.ones(1, 288)}
    with pytest.raises(ConfigError, match="expand_timesteps"):
        WanHost(wan).read_call(per_token)
    with pytest.raises(ConfigError, match="1 x 8 x 8 patches"):
        wan_adapter()[0](videos(1, edge=12), SIGMA_B[:1], wan_condition(1), 4)
