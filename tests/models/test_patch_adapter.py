"""The adapter's own parts: how they start, what they save, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.patch_cases import (
    flux_adapter,
    flux_condition,
    images,
    stirred,
    tiny_flux,
    videos,
    wan_adapter,
    wan_condition,
)
from trinity.core.errors import CheckpointError, ConfigError
from trinity.models.host_flux import FluxHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patching import PatchInit, resize_deembed, resize_embed

SIGMA_B = torch.tensor([0.9, 0.3])


@pytest.mark.parametrize("init", ["pseudo_inverse", "sub_patch_average"])
def test_it_starts_from_the_models_resized_projections_alone(init: PatchInit) -> None:
    base: Any = tiny_flux()
    adapter = PatchAdapter(FluxHost(base), lora_rank=3, init=init)
    bare = PatchAdapter(FluxHost(base), lora_rank=0, residual_width=0, init=init)
    z, condition = images(2), flux_condition(2)
    for scale in (2, 4):
        part = adapter.part(scale)
        weight, size = base.x_embedder.weight, 2 * scale
        assert torch.equal(part.embed_DP, resize_embed(weight, 2, size, init=init))
        rows, bias = resize_deembed(base.proj_out.weight, base.proj_out.bias, 2, size, init=init)
        assert bias is not None
        assert torch.equal(part.deembed_PD, rows)
        assert torch.equal(part.deembed_bias_P, bias)
        assert torch.equal(part.embed_bias_D, base.x_embedder.bias)
        got = adapter(z, SIGMA_B, condition, scale)
        assert torch.equal(got, bare(z, SIGMA_B, condition, scale))


def test_a_constant_image_has_the_models_token_at_any_size() -> None:
    """The embedding is resized, not merely copied: flat areas look alike."""
    adapter = PatchAdapter(FluxHost(tiny_flux()), residual_width=0)
    z = torch.ones(2, 3, 16, 16) * torch.tensor([0.3, -1.0, 2.0]).view(1, 3, 1, 1)
    base: Any = adapter.host.base
    fine = z[:, :, :2, :2].flatten(1) @ base.x_embedder.weight.T
    for scale in (2, 4):
        size = 2 * scale
        coarse = z[:, :, :size, :size].flatten(1) @ adapter.part(scale).embed_DP.T
        torch.testing.assert_close(coarse, fine, rtol=1e-4, atol=1e-5)


def test_every_weight_learns_from_the_second_step_on() -> None:
    """Zeroed last layers get a gradient at once, what lies before them one step later."""
    adapter = PatchAdapter(FluxHost(tiny_flux()), (1, 2), lora_rank=2)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        adapter(images(2), SIGMA_B, flux_condition(2), 2).square().sum().backward()
        still = {name for name, p in adapter.named_parameters() if not p.grad.abs().any()}
        zeroed = {name for name in still if "conv_in" in name or "down_RN" in name}
        assert still == zeroed if step == 0 else not still
        optimizer.step()


def test_the_other_scale_gets_no_gradient() -> None:
    adapter, _ = flux_adapter()
    adapter(images(2), SIGMA_B, flux_condition(2), 4).sum().backward()
    assert all(p.grad is None for p in adapter.part(2).parameters())
    assert all(p.grad is not None for p in adapter.part(4).parameters())


def test_frames_of_a_video_pass_the_residual_path_alone() -> None:
    adapter, _ = wan_adapter()
    path = adapter.part(2).residual
    assert path is not None
    z = videos(2)
    whole = path(z, SIGMA_B)
    for frame in range(3):
        torch.testing.assert_close(whole[:, :, frame], path(z[:, :, frame], SIGMA_B))
    assert not torch.allclose(path(z, SIGMA_B), path(z, SIGMA_B.flip(0)))


def test_a_model_in_half_precision_keeps_an_adapter_in_full() -> None:
    base = tiny_flux()
    z, condition = images(2), flux_condition(2)
    exact = stirred(PatchAdapter(FluxHost(base)), amount=0.03)(z, SIGMA_B, condition, 2).detach()
    adapter = stirred(PatchAdapter(FluxHost(base.bfloat16())), amount=0.03)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    got = adapter(z, SIGMA_B, condition, 2)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.part(2).parameters())


def _gradients(adapter: PatchAdapter, *, attached: bool) -> list[Tensor]:
    adapter.zero_grad()
    if attached:
        with adapter.attached(2):
            adapter(images(2), SIGMA_B, flux_condition(2), 2).square().sum().backward()
    else:
        adapter(images(2), SIGMA_B, flux_condition(2), 2).square().sum().backward()
    return [p.grad.clone() for p in adapter.part(2).parameters()]


def test_recomputation_in_the_model_sees_the_adapter_or_is_refused() -> None:
    adapter, base = flux_adapter()
    model: Any = base
    expected = _gradients(adapter, attached=False)
    model.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match=r"inside attached\(2\)"):
        _gradients(adapter, attached=False)
    with torch.no_grad():
        adapter(images(2), SIGMA_B, flux_condition(2), 2)  # nothing will be recomputed
    for own, reference in zip(_gradients(adapter, attached=True), expected, strict=True):
        torch.testing.assert_close(own, reference)
    assert not any(module._forward_hooks for module in base.modules())


def test_a_saved_adapter_is_the_same_on_the_same_model(tmp_path: Path) -> None:
    for make, z, condition in (
        (flux_adapter, images(2), flux_condition(2)),
        (wan_adapter, videos(2), wan_condition(2)),
    ):
        adapter, _ = make(scales=(1, 2))
        adapter.save(tmp_path / "adapter.safetensors")
        loaded = PatchAdapter.load(tmp_path / "adapter.safetensors", adapter.host)
        assert loaded.scales == (1, 2)
        expected = adapter(z, SIGMA_B, condition, 2)
        assert torch.equal(loaded(z, SIGMA_B, condition, 2), expected)
        assert list(tmp_path.iterdir()) == [tmp_path / "adapter.safetensors"]


def test_its_state_is_the_adapters_alone() -> None:
    adapter, base = flux_adapter()
    theirs = {id(p) for p in base.parameters()}
    assert not any(id(p) in theirs for p in adapter.parameters())
    assert all(name.startswith(("parts.2.", "parts.4.")) for name in adapter.state_dict())
    assert not any(
        p.data_ptr() == q.data_ptr() for p in adapter.parameters() for q in base.parameters()
    )


def test_files_of_another_model_or_kind_are_refused(tmp_path: Path) -> None:
    adapter, _ = flux_adapter(scales=(1, 2))
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    with pytest.raises(CheckpointError, match="made for base_config"):
        PatchAdapter.load(path, FluxHost(tiny_flux(num_layers=2)))
    with pytest.raises(CheckpointError, match="base_class 'FluxTransformer2DModel'"):
        PatchAdapter.load(path, wan_adapter()[0].host)
    with pytest.raises(CheckpointError, match="absent"):
        PatchAdapter.load(tmp_path / "absent", adapter.host)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="pass a saved adapter"):
        PatchAdapter.load(path, adapter.host)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="format None"):
        PatchAdapter.load(path, adapter.host)
    weights = adapter.state_dict()
    del weights["parts.2.size_D"]
    save_file(weights, path, metadata=adapter.metadata())
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*parts\.2\.size_D"):
        PatchAdapter.load(path, adapter.host)


def test_the_seed_decides_its_first_weights_and_no_others() -> None:
    host = FluxHost(tiny_flux())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = PatchAdapter(host, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    same, other = (PatchAdapter(host, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scales", [(1,), (2, 4), (1, 4, 2), (1, 2, 2), ()])
def test_scales_must_rise_from_one(scales: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="begin with 1"):
        PatchAdapter(FluxHost(tiny_flux()), scales)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="lora_rank = -1"):
        PatchAdapter(FluxHost(tiny_flux()), lora_rank=-1)
    adapter, _ = flux_adapter()
    with pytest.raises(ConfigError, match=r"scale 3 is not one of \(1, 2, 4\)"):
        adapter(images(2), SIGMA_B, flux_condition(2), 3)
    with pytest.raises(ConfigError, match="whole number of 1 x 8 x 8 patches"):
        adapter(images(2, edge=12), SIGMA_B, flux_condition(2), 4)
