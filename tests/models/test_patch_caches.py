"""Caches of diffusers together with changes of the patch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.patch_cases import (
    flux_adapter,
    flux_condition,
    images,
    stirred,
    tiny_flux,
)
from tests.models.pipeline_cases import HALVES, HALVES_SIZES, NUM_STEPS, FluxLoop
from trinity.core.errors import ConfigError
from trinity.models.host_flux import FluxHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_pipeline import DynamicTransformer
from trinity.models.patch_scheduler import PatchScheduler


def _latent(tokens: Tensor) -> Tensor:
    """(B, 96, 12) packed tokens to (B, 3, 16, 24)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (8, 12)), 2)


def _caches(base: nn.Module) -> dict[str, Any]:
    """All that the caches of a model hold, by context."""
    found: dict[str, Any] = {}
    for module in base.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            found |= getattr(getattr(hook, "state_manager", None), "_state_cache", {})
    return found


def _cached(kind: str, base: Any, strength: float = 1e9) -> None:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import TaylorSeerCacheConfig

    if kind == "first block":
        base.enable_cache(FirstBlockCacheConfig(threshold=strength))
    else:
        lite = kind == "taylor lite"
        settings = {"cache_interval": 4, "disable_cache_before_step": 1, "use_lite_mode": lite}
        base.enable_cache(TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **settings))


KINDS = ["first block", "taylor", "taylor lite"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_size_uses_the_cache_as_the_model_does(kind: str) -> None:
    """Under the cache, and with the same result as a pipeline without us."""
    base = tiny_flux()
    _cached(kind, base, strength=0.3)
    condition, z = flux_condition(2), images(2)
    adapter = PatchAdapter(FluxHost(base), lora_rank=3)
    with torch.no_grad():
        expected = FluxLoop(base, condition).run(z)[-1]
        base._reset_stateful_cache()
        dynamic = DynamicTransformer(base, adapter, PatchScheduler(0.0), num_steps=NUM_STEPS)
        assert torch.equal(FluxLoop(dynamic, condition).run(z)[-1], expected)
        base.disable_cache()
        plain = FluxLoop(base, condition).run(z)[-1]
    assert not torch.allclose(plain, expected, atol=1e-5)  # the cache did skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_stretch_of_a_size_has_a_cache_of_its_own(kind: str) -> None:
    """A run over three sizes is three runs whose caches begin empty.

    The first block cache skips whatever it can: one residual too old or of other tokens would show.
    """
    base = tiny_flux()
    adapter = stirred(PatchAdapter(FluxHost(base), lora_rank=3), amount=0.05)
    condition, z = flux_condition(2), images(2)
    dynamic = DynamicTransformer(base, adapter, HALVES, num_steps=NUM_STEPS)
    _cached(kind, base)
    with torch.no_grad():
        got = FluxLoop(dynamic, condition).run(z)
        tokens = got[0]
        for step, size in enumerate(HALVES_SIZES):
            if step == 0 or size != HALVES_SIZES[step - 1]:
                base._reset_stateful_cache()
            sigma = torch.full((2,), 1 - step / NUM_STEPS)
            with base.cache_context("alone"):
                latent = _latent(tokens)
                velocity = adapter(latent, sigma, condition, size)
            tokens = tokens - adapter.host.write_sample(velocity) / NUM_STEPS
            torch.testing.assert_close(got[step + 1], tokens, rtol=1e-4, atol=1e-5)
    assert dynamic.record().scale_KB[:, 0].tolist() == HALVES_SIZES


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_other_rows_are_never_used(kind: str) -> None:
    """Rows that change groups at different times: each is as if it were sampled alone."""
    base = tiny_flux()
    adapter = stirred(PatchAdapter(FluxHost(base), lora_rank=3), amount=0.05)
    condition = flux_condition(3)
    z = images(3) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)
    host = adapter.host
    with torch.no_grad():
        probe = DynamicTransformer(base, adapter, PatchScheduler(0.0), num_steps=NUM_STEPS)
        FluxLoop(probe, condition).run(z)
        tau = float(probe.record().statistic_KBS[3:].nanmedian())
        rule = PatchScheduler(tau, min_fine_last=2)
        dynamic = DynamicTransformer(base, adapter, rule, num_steps=NUM_STEPS)
        _cached(kind, base)
        path = FluxLoop(dynamic, condition).run(z)
        sizes_KB = dynamic.record().scale_KB
        groupings = {tuple(row) for row in sizes_KB.tolist()}
        assert len(groupings) > 2, groupings
        # Alone, with a fresh cache whenever the group that a row was in changes.
        for row in range(3):
            rows = torch.tensor([row])
            taken = host.take(condition, rows)
            for step in range(NUM_STEPS):
                members = sizes_KB[step] == sizes_KB[step, row]
                changed = step == 0 or not torch.equal(
                    members, sizes_KB[step - 1] == sizes_KB[step - 1, row]
                )
                if changed or sizes_KB[step, row] != sizes_KB[step - 1, row]:
                    base._reset_stateful_cache()
                latent = _latent(path[step][rows])
                with base.cache_context("alone"):
                    sigma = torch.full((1,), 1 - step / NUM_STEPS)
                    velocity = adapter(latent, sigma, taken, int(sizes_KB[step, row]))
                expected = path[step][rows] - host.write_sample(velocity) / NUM_STEPS
                torch.testing.assert_close(path[step + 1][rows], expected, rtol=1e-4, atol=1e-5)


def test_what_is_cached_is_thrown_away_when_its_group_is_gone() -> None:
    base = tiny_flux()
    _cached("first block", base)
    adapter = PatchAdapter(FluxHost(base), lora_rank=3)
    dynamic = DynamicTransformer(base, adapter, HALVES, num_steps=NUM_STEPS)
    held = []
    original = adapter.forward

    def spied(*args: Any, **kwargs: Any) -> Any:
        held.append(sorted(_caches(base)))
        return original(*args, **kwargs)

    adapter.forward = spied
    with torch.no_grad():
        FluxLoop(dynamic, flux_condition(2), names=("cond", "uncond")).run(images(2))
    assert max(len(names) for names in held) == 2  # never more than the two halves of a pair
    assert held[-1] == ["cond, size 1, rows [0, 1]", "uncond, size 1, rows [0, 1]"]
    assert held[6] == []  # the first call after the switch to size 2
    dynamic.reset()
    assert _caches(base) == {}


def test_a_skipped_step_enters_the_history_too() -> None:
    """The rule sees every latent that goes by, computed or not."""
    base = tiny_flux()
    adapter = PatchAdapter(FluxHost(base), lora_rank=3)
    dynamic = DynamicTransformer(base, adapter, PatchScheduler(0.0), num_steps=NUM_STEPS)
    _cached("first block", base)
    computed = []
    last = base.get_submodule("single_transformer_blocks.0.proj_mlp")
    last.register_forward_pre_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        path = FluxLoop(dynamic, flux_condition(2)).run(images(2))
    assert len(computed) == 1  # all steps but the first were skipped
    latents = [_latent(t) for t in path]
    sigmas = [1 - step / NUM_STEPS for step in range(NUM_STEPS)]
    rule = PatchScheduler(0.0)
    for step in range(3, NUM_STEPS):
        expected = rule.statistic(latents[: step + 1], sigmas[: step + 1])
        torch.testing.assert_close(dynamic.record().statistic_KBS[step], expected)


def test_caches_that_cannot_be_split_are_refused() -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    adapter, base = flux_adapter()
    model: Any = base
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    dynamic = DynamicTransformer(base, adapter, HALVES, num_steps=4)
    with pytest.raises(ConfigError, match="pyramid_attention_broadcast does not follow"):
        FluxLoop(dynamic, flux_condition(1)).run(images(1), num_steps=4)
