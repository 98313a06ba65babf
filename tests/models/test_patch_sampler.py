"""Sampling at sizes per step and sample: groups, guidance, baselines, the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.models.patch_cases import (
    flux_adapter,
    flux_condition,
    images,
    tiny_flux,
    videos,
    wan_adapter,
    wan_condition,
)
from trinity.core.errors import ConfigError
from trinity.models.flow import ancestral, euler, heun, sampling_sigmas
from trinity.models.host_flux import FluxHost
from trinity.models.patch_sampler import (
    FixedSplit,
    PatchedVelocity,
    PatchPath,
    adapter_velocity,
    check_fit,
    pooled_velocity,
    sample,
)
from trinity.models.patch_scheduler import PatchDecision, PatchScheduler, token_fraction
from trinity.models.patching import patchify, pool_snr_matched, velocity_from_pooled

SIGMAS = sampling_sigmas(14, shift=2.0)
NUM_STEPS = 14


@dataclass(frozen=True)
class Scripted:
    """A policy that reads its sizes (K, B) from a table and keeps what it was shown."""

    table_KB: Tensor
    rows: tuple[int, ...]
    sizes: tuple[int, ...] = (1, 2, 4)

    def first(self, num_samples: int, device: torch.device | str = "cpu") -> PatchDecision:
        ones_B = torch.ones(num_samples, dtype=torch.int64)
        return PatchDecision(ones_B, ones_B, torch.zeros(num_samples, 2))

    def decide(
        self,
        previous: PatchDecision,
        latents: Sequence[Tensor],
        sigmas: Sequence[float],
        *,
        step: int,
        num_steps: int,
    ) -> PatchDecision:
        return replace(previous, scale_B=self.table_KB[step, list(self.rows)])


def _script(num_rows: int, rows: Sequence[int] | None = None) -> Scripted:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 3, (NUM_STEPS, num_rows), generator=generator)
    return Scripted(2**draws, tuple(rows or range(num_rows)))


def test_a_batch_of_mixed_sizes_is_its_samples_alone() -> None:
    """For images and videos, with a script that mixes all sizes in most steps."""
    for (adapter, _), z, condition in (
        (flux_adapter(), images(4), flux_condition(4)),
        (wan_adapter(), videos(3), wan_condition(3)),
    ):
        geometry, rows = adapter.host.geometry, range(len(z))
        velocity = adapter_velocity(adapter, condition)
        with torch.no_grad():
            together = sample(velocity, z, SIGMAS, _script(len(z)), geometry)
            for row in rows:
                one = torch.tensor([row])
                alone = adapter_velocity(adapter, adapter.host.take(condition, one))
                script = _script(len(z), [row])
                expected = sample(alone, z[one], SIGMAS, script, geometry)
                for got, reference in zip(together.latents, expected.latents, strict=True):
                    torch.testing.assert_close(got[one], reference, rtol=1e-4, atol=1e-4)
                assert torch.equal(together.record.tokens_KB[:, one], expected.record.tokens_KB)


def test_the_rule_decides_for_each_sample_as_if_it_were_alone() -> None:
    """The same with the real rule, whose sizes follow the samples' own paths."""
    adapter, _ = flux_adapter()
    condition, geometry = flux_condition(4), adapter.host.geometry
    z = images(4) * torch.tensor([0.1, 0.3, 1.0, 3.0]).view(4, 1, 1, 1)
    velocity = adapter_velocity(adapter, condition)
    with torch.no_grad():
        fine = sample(velocity, z, SIGMAS, PatchScheduler(0.0), geometry)
        tau = float(fine.record.statistic_KBS[3:].nanmedian())
        scheduler = PatchScheduler(tau, min_fine_last=2)
        together = sample(velocity, z, SIGMAS, scheduler, geometry)
        scales_KB = together.record.scale_KB
        assert (scales_KB != scales_KB[:, :1]).any()
        for row in range(4):
            one = torch.tensor([row])
            alone = adapter_velocity(adapter, adapter.host.take(condition, one))
            expected = sample(alone, z[one], SIGMAS, scheduler, geometry)
            assert torch.equal(expected.record.scale_KB[:, 0], scales_KB[:, row])
            torch.testing.assert_close(
                together.latents[-1][one], expected.latents[-1], rtol=1e-4, atol=1e-4
            )


def test_at_the_base_patch_it_is_the_models_own_run_to_the_bit() -> None:
    adapter, _ = flux_adapter()
    condition, z = flux_condition(2), images(2)

    def own(z: Tensor, sigma: float) -> Tensor:
        return adapter.host.velocity(z, torch.full((2,), sigma), condition)

    velocity = adapter_velocity(adapter, condition)
    with torch.no_grad():
        got = sample(velocity, z, SIGMAS, PatchScheduler(0.0), adapter.host.geometry)
        for one, other in zip(got.latents, euler(own, z, SIGMAS), strict=True):
            assert torch.equal(one, other)
    assert got.record.scale_KB.tolist() == [[1, 1]] * NUM_STEPS
    assert got.record.tokens_KB.tolist() == [[96, 96]] * NUM_STEPS


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_the_model_sees_as_many_tokens_as_the_record_says(kind: str) -> None:
    if kind == "flux":
        (adapter, base), z, condition = flux_adapter(), images(2), flux_condition(2)
        block = base.get_submodule("transformer_blocks.0")
    else:
        (adapter, base), z, condition = wan_adapter(), videos(2), wan_condition(2)
        block = base.get_submodule("blocks.0")
    seen = []

    def count(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append(hidden.shape[0] * hidden.shape[1])

    split = FixedSplit(((4, 0.25), (2, 0.5)))
    with block.register_forward_pre_hook(count, with_kwargs=True), torch.no_grad():
        velocity = adapter_velocity(adapter, condition)
        got = sample(velocity, z, SIGMAS, split, adapter.host.geometry)
    assert seen == got.record.tokens_KB.sum(dim=1).tolist()
    full = 2 * 96 * (3 if kind == "wan" else 1)
    assert seen == [full // 16] * 4 + [full // 4] * 6 + [full] * 4
    assert token_fraction(got.record.scale_KB) == pytest.approx((4 / 16 + 6 / 4 + 4) / 14)


def test_guidance_has_one_decision_for_both_halves() -> None:
    adapter, _ = flux_adapter()
    condition, null = flux_condition(3), flux_condition(3, seed=9)
    asked: list[int] = []
    guided = adapter_velocity(adapter, condition, null_condition=null, guidance_scale=3.0)

    def velocity(z: Tensor, sigma: float, scale: int, rows_N: Tensor) -> Tensor:
        asked.extend([scale] * len(rows_N))
        return guided(z, sigma, scale, rows_N)

    z = images(3)
    with torch.no_grad():
        got = sample(velocity, z, SIGMAS, _script(3), adapter.host.geometry)
        scales_KB = got.record.scale_KB
        assert sorted(asked) == sorted(scales_KB.flatten().tolist())
        expected = z
        for step, sigma in enumerate(SIGMAS[:-1]):
            rows = []
            for row in range(3):
                pair = [
                    adapter(
                        expected[row : row + 1],
                        torch.tensor([sigma]),
                        adapter.host.take(half, torch.tensor([row])),
                        int(scales_KB[step, row]),
                    )
                    for half in (condition, null)
                ]
                rows.append(pair[1] + 3.0 * (pair[0] - pair[1]))
            expected = expected + (SIGMAS[step + 1] - sigma) * torch.cat(rows)
    torch.testing.assert_close(got.latents[-1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [2, 4])
def test_pooled_velocity_is_the_model_on_the_pooled_latent(scale: int) -> None:
    host, condition, z = FluxHost(tiny_flux()), flux_condition(3), images(2)
    rows_N, sigma_N = torch.tensor([0, 2]), torch.full((2,), 0.8)
    pooled = pool_snr_matched(z, sigma_N, scale)
    taken = host.take(condition, rows_N)
    small = host.velocity(pooled.latent, pooled.sigma_B, taken, spacing=scale)
    expected = velocity_from_pooled(z, sigma_N, pooled, small)
    velocity = pooled_velocity(host, condition)
    torch.testing.assert_close(velocity(z, 0.8, scale, rows_N), expected)
    own = host.velocity(z, torch.full((2,), 0.8), taken)
    assert torch.equal(velocity(z, 0.8, 1, rows_N), own)


def test_other_solvers_run_with_sizes_too() -> None:
    adapter, _ = flux_adapter()
    velocity = adapter_velocity(adapter, flux_condition(2))
    split, geometry = FixedSplit(((2, 0.5),)), adapter.host.geometry

    def noisy(v: object, z: Tensor, sigmas: Sequence[float]) -> object:
        return ancestral(v, z, sigmas, seed=0)

    with torch.no_grad():
        for solver in (heun, noisy):
            got = sample(velocity, images(2), SIGMAS, split, geometry, solver=solver)
            assert got.latents[-1].isfinite().all()
            assert got.record.scale_KB[:14, 0].tolist() == [2] * 7 + [1] * 7
        got = sample(velocity, images(2), SIGMAS, PatchScheduler(1e3), geometry, solver=heun)
    # A step of its own for the call at sigma 0; the two calls at other sigmas share one.
    assert len(got.record.scale_KB) == NUM_STEPS + 1
    assert got.record.scale_KB[:, 0].tolist() == [1] * 3 + [4] * 6 + [1] * 6


def test_a_second_call_at_a_noise_level_is_the_same_step() -> None:
    path = PatchPath(PatchScheduler(1e3), num_steps=20)
    z = images(2)
    decisions = [path.decide(z, 1.0 - 0.05 * step) for step in range(5)]
    assert path.decide(2 * z, 1.0 - 0.05 * 4) is decisions[-1]
    assert path.step == 4
    assert path.continues(z, 0.8)
    assert not path.continues(z, 0.81)
    assert not path.continues(z[:1], 0.5)
    # The latents of the second call have replaced those of the first.
    assert (path.decide(z, 0.75).statistic_BS > 1e-3).all()


def test_fixed_split_follows_its_shares() -> None:
    split = FixedSplit(((4, 0.2), (2, 0.25)))
    assert split.sizes == (1, 2, 4)
    decision, sizes = split.first(3), []
    for step in range(20):
        decision = split.decide(decision, [], [], step=step, num_steps=20)
        sizes.append(decision.scale_B.tolist())
        assert decision.statistic_BS.shape == (3, 2)
    assert sizes == [[4] * 3] * 4 + [[2] * 3] * 5 + [[1] * 3] * 11
    assert FixedSplit(()).decide(decision, [], [], step=0, num_steps=5).scale_B.tolist() == [1] * 3


def test_tokens_of_the_geometry_are_those_of_the_cut() -> None:
    for (adapter, _), z in ((flux_adapter(), images(2)), (wan_adapter(), videos(2))):
        geometry = adapter.host.geometry
        for scale in (1, 2, 4):
            tokens = patchify(z, geometry.patch * scale, frames=geometry.frames)
            assert geometry.num_tokens(tuple(z.shape[2:]), scale) == tokens.shape[1]


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="more than 1"):
        FixedSplit(((2, 0.6), (4, 0.5)))
    with pytest.raises(ConfigError, match="above 0"):
        FixedSplit(((0, 0.5),))
    adapter, _ = flux_adapter(scales=(1, 2))
    with pytest.raises(ConfigError, match=r"sizes \[4\] are not among"):
        check_fit(adapter, PatchScheduler(0.1))
    with pytest.raises(ConfigError, match="base_patch = 1"):
        check_fit(adapter, PatchScheduler(0.1, sizes=(1, 2), base_patch=1))
    check_fit(adapter, FixedSplit(((2, 1.0),)))
    velocity = PatchedVelocity(adapter_velocity(adapter, flux_condition(2)), PatchScheduler(0.1), 8)
    for sigma in (1.0, 0.9, 0.8):
        velocity.path.decide(images(2).bfloat16(), sigma)
    with pytest.raises(ConfigError, match="float32"):
        velocity(images(2).bfloat16(), 0.7)
