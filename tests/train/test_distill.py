"""Distilling a patch adapter: what it learns, what a run leaves behind, and going on with one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.patch_cases import (
    POOLED_WIDTH,
    TEXT_WIDTH,
    flux_adapter,
    flux_condition,
    images,
    stirred,
    tiny_flux,
    tiny_wan,
    videos,
    wan_condition,
)
from trinity.core.draws import Stream, normal_by_row
from trinity.core.errors import CheckpointError, ConfigError, TrainingError
from trinity.models.flow import interpolate, sampling_sigmas, training_sigmas
from trinity.models.host_flux import FluxCondition, FluxHost
from trinity.models.host_wan import WanHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_sampler import PatchRecord, adapter_velocity, sample
from trinity.models.patch_scheduler import PatchScheduler, token_fraction
from trinity.train.distill import DistillConfig, DistillReport, distill, relative_errors
from trinity.train.metrics import read_metrics

HIGH_NOISE = (0.95, 0.8, 0.6)


def _digits() -> Tensor:
    """1797 handwritten digits as latents (N, 1, 16, 16) of unit variance."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    x = F.interpolate(small, size=(16, 16), mode="bilinear")
    return (x - x.mean()) / x.std()


def _unconditional(num_rows: int) -> FluxCondition:
    return FluxCondition(torch.zeros(num_rows, 1, TEXT_WIDTH), torch.zeros(num_rows, POOLED_WIDTH))


def _train_flux(base: nn.Module, x: Tensor, *, num_steps: int, batch_rows: int) -> None:
    """Plain flow matching."""
    host, generator = FluxHost(base), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(num_steps):
        rows = torch.randint(0, len(x), (batch_rows,), generator=generator)
        eps = torch.randn(x[rows].shape, generator=generator)
        sigma_B = torch.randn(batch_rows, generator=generator).sigmoid()
        z = interpolate(x[rows], eps, sigma_B)
        velocity = host.velocity(z, sigma_B, _unconditional(batch_rows))
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / num_steps)) / 2
        optimizer.zero_grad()
        (velocity - (eps - x[rows])).square().mean().backward()
        optimizer.step()


class Distilled(NamedTuple):
    """Adapters of one small trained model."""

    with_residual: PatchAdapter
    report: DistillReport
    without: DistillReport


@pytest.fixture(scope="module")
def distilled() -> Distilled:
    """A model that has seen some digits, and adapters that have seen some of the model."""
    x, base = _digits()[:600], tiny_flux(channels=1)
    _train_flux(base, x, num_steps=80, batch_rows=16)
    config = DistillConfig(num_steps=100, batch_rows=8, held_out_rows=16)
    bare = PatchAdapter(FluxHost(base), (1, 2), lora_rank=4, residual_width=0)
    adapter = PatchAdapter(FluxHost(base), (1, 2), lora_rank=4, residual_width=16)
    without = distill(bare, x, _unconditional(600), config)
    return Distilled(adapter, distill(adapter, x, _unconditional(600), config), without)


def test_distillation_lowers_the_error_most_by_the_residual_path(distilled: Distilled) -> None:
    before, after = distilled.report.before[2], distilled.report.after[2]
    without = distilled.without.after[2]
    for sigma in HIGH_NOISE:
        assert after[sigma] < 0.45 * before[sigma], (before, after)
        gained, gained_without = before[sigma] - after[sigma], before[sigma] - without[sigma]
        assert gained > 1.5 * gained_without, (before, after, without)
    assert after[0.2] > max(after[sigma] for sigma in HIGH_NOISE)  # coarse is for high noise


def _runs(adapter: PatchAdapter, tau: float, **rule: Any) -> PatchRecord:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 1, 16, 16, generator=generator)
    velocity = adapter_velocity(adapter, _unconditional(4))
    scheduler = PatchScheduler(tau, sizes=(1, 2), **rule)
    with torch.no_grad():
        geometry = adapter.host.geometry
        return sample(velocity, z, sampling_sigmas(40), scheduler, geometry).record


def test_real_runs_do_not_chatter_and_use_fewer_tokens_as_the_threshold_rises(
    distilled: Distilled,
) -> None:
    adapter = distilled.with_residual
    known = _runs(adapter, 0.0).statistic_KBS[3:].flatten()
    taus = [0.0, *torch.quantile(known, torch.tensor([0.2, 0.5, 0.9])).tolist(), 1.0]
    records = [_runs(adapter, tau) for tau in taus]
    fractions = [token_fraction(record.scale_KB) for record in records]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == 1.0
    assert fractions[-1] == pytest.approx((8 + 32 / 4) / 40)
    assert fractions[-2] < fractions[1]
    for record in records:
        scale_KB = record.scale_KB
        assert int((scale_KB[1:] != scale_KB[:-1]).sum(dim=0).max()) <= 4  # twice the sizes


# Trains a larger model first: a minute or two.
@pytest.mark.slow
def test_the_relative_error_falls_below_a_fifth_at_high_noise() -> None:
    x = _digits()
    base = tiny_flux(channels=1, num_single_layers=2, num_attention_heads=3)
    _train_flux(base, x, num_steps=300, batch_rows=32)
    adapter = PatchAdapter(FluxHost(base), (1, 2), lora_rank=8)
    config = DistillConfig(num_steps=300, batch_rows=16)
    report = distill(adapter, x, _unconditional(len(x)), config)
    assert max(report.after[2][sigma] for sigma in HIGH_NOISE) < 0.2, report
    bare = PatchAdapter(FluxHost(base), (1, 2), lora_rank=8, residual_width=0)
    without = distill(bare, x, _unconditional(len(x)), config).after[2]
    assert all(without[sigma] > 2 * report.after[2][sigma] for sigma in HIGH_NOISE)


TINY = DistillConfig(
    num_steps=8,
    batch_rows=2,
    warmup_steps=2,
    held_out_rows=2,
    report_sigmas=(0.9, 0.4),
    log_every_steps=2,
    save_every_steps=4,
)


def _adapter(seed: int = 0) -> PatchAdapter:
    return PatchAdapter(FluxHost(tiny_flux()), lora_rank=2, residual_width=4, seed=seed)


def test_a_step_is_the_gradient_of_the_mean_square_difference() -> None:
    """The first step on each scale, redone by hand from the written draws."""
    config = replace(TINY, num_steps=2, learning_rate=1e-2, lora_learning_rate=1e-3)
    adapter, reference = _adapter(), _adapter()
    x, condition = images(5), flux_condition(5)
    distill(adapter, x, condition, config)
    for step, scale in ((0, 2), (1, 4)):
        sigma_B = training_sigmas(0, step, range(2), config.density(scale))
        eps = normal_by_row(0, step, range(2), (3, 16, 24), Stream.NOISE)
        moved = 0
        rows = _rows_by_hand(num_train=3, step=step)
        z = interpolate(x[rows], eps, sigma_B)
        taken = reference.host.take(condition, rows)
        fine = reference(z, sigma_B, taken, 1).detach()
        loss = (reference(z, sigma_B, taken, scale) - fine).square().mean()
        factor = (0.5, 1.0)[step]  # of a warm-up over two steps
        part, own = reference.part(scale), dict(adapter.part(scale).named_parameters())
        gradients = torch.autograd.grad(loss, list(part.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for (name, p), gradient in zip(part.named_parameters(), gradients, strict=True):
            gradient = gradient * min(1.0, 1.0 / float(norm))
            rate = factor * (1e-3 if name.startswith("lora") else 1e-2)
            expected = p - rate * gradient / (gradient.abs() + 1e-8)  # Adam's first step
            torch.testing.assert_close(own[name], expected, rtol=1e-3, atol=2e-5, msg=name)
            moved += int(not torch.equal(own[name], p))
        assert moved == len(gradients) - sum(".down" in n or "conv_in" in n for n in own)


def _rows_by_hand(num_train: int, step: int) -> Tensor:
    from trinity.core.draws import generator_for

    stream = [
        int(row)
        for epoch in range(3)
        for row in generator_for(0, epoch, 0, Stream.CONDITION).permutation(num_train)
    ]
    return torch.tensor(stream[2 * step : 2 * step + 2])


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    x, condition = images(6), flux_condition(6)
    whole = _adapter()
    expected = distill(whole, x, condition, TINY, folder=tmp_path / "whole")
    calls = 0

    class BrokenOffError(Exception):
        pass

    first = _adapter()
    original = first.attached

    def breaks(scale: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 16:  # four for the errors before, two for each step
            raise BrokenOffError
        return original(scale)

    first.attached = breaks
    with pytest.raises(BrokenOffError):
        distill(first, x, condition, TINY, folder=tmp_path / "parts")
    again = _adapter(seed=9)  # everything comes from the file
    report = distill(again, x, condition, TINY, folder=tmp_path / "parts")
    assert report.first_step == 4
    assert report.after == expected.after
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    kept = [
        {key: value for key, value in row.items() if key != "time"}
        for row in read_metrics(tmp_path / "parts")
    ]
    reference = read_metrics(tmp_path / "whole")
    assert kept == [{k: v for k, v in row.items() if k != "time"} for row in reference]
    once_more = distill(again, x, condition, TINY, folder=tmp_path / "parts")
    assert once_more.first_step == 8
    assert len(read_metrics(tmp_path / "parts")) == len(kept)


def test_a_run_leaves_its_record_and_an_adapter(tmp_path: Path) -> None:
    adapter = _adapter()
    report = distill(adapter, images(6), flux_condition(6), TINY, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8]
    assert all(row["loss"] > 0 for row in rows if row["kind"] == "train")
    found = {row["scale"]: row for row in rows if row["kind"] == "validation"}
    assert {scale: row["error_0.9"] for scale, row in found.items()} == {
        scale: errors[0.9] for scale, errors in report.after.items()
    }
    loaded = PatchAdapter.load(tmp_path / "adapter.safetensors", adapter.host)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_relative_error_is_the_ratio_of_squares() -> None:
    """Reference: one row at a time; every scale and batch size sees the same noise."""
    adapter, _ = flux_adapter()
    x, condition = images(5), flux_condition(5)
    wrong = whole = 0.0
    for row in range(5):
        eps = normal_by_row(7, 0, [row], (3, 16, 24), Stream.NOISE)
        sigma_B = torch.tensor([0.7])
        z = interpolate(x[row : row + 1], eps, sigma_B)
        taken = adapter.host.take(condition, torch.tensor([row]))
        fine = adapter(z, sigma_B, taken, 1)
        wrong += float((adapter(z, sigma_B, taken, 4) - fine).detach().square().sum())
        whole += float(fine.detach().square().sum())
    for batch_rows in (1, 2, 5):
        got = relative_errors(
            adapter, x, condition, 4, sigmas=(0.7,), seed=7, batch_rows=batch_rows
        )
        assert got[0.7] == pytest.approx(wrong / whole, rel=1e-4)


def test_coarser_sizes_are_trained_at_more_noise() -> None:
    config = DistillConfig(sigma_mean=0.7, sigma_std=0.9)
    for scale, mean in ((2, 0.7), (4, 1.4)):
        median = config.density(scale).quantile(torch.tensor([0.5, 0.8413447], dtype=torch.float64))
        torch.testing.assert_close(median.logit().float(), torch.tensor([mean, mean + 0.9]))


def test_the_model_is_frozen_meanwhile_and_then_as_it_was() -> None:
    adapter = _adapter()
    base: Any = adapter.host.base
    base.proj_out.requires_grad_(False)
    before = {name: p.clone() for name, p in base.named_parameters()}
    distill(adapter, images(6), flux_condition(6), TINY)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (not name.startswith("proj_out"))


def test_recomputation_changes_nothing() -> None:
    plain, thrifty = _adapter(), _adapter()
    model: Any = thrifty.host.base
    model.enable_gradient_checkpointing()
    for adapter in (plain, thrifty):
        distill(adapter, images(6), flux_condition(6), TINY)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(thrifty.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_videos_and_channels_beside_the_latent_are_distilled_too() -> None:
    """Extra channels reach the model without noise."""
    base = tiny_wan(in_channels=5)
    adapter = stirred(PatchAdapter(WanHost(base), (1, 2), lora_rank=2), amount=0.05)
    x = torch.cat([videos(4), torch.full_like(videos(4)[:, :2], 0.25)], dim=1)
    seen = []
    handle = base.get_submodule("patch_embedding").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    report = distill(adapter, x, wan_condition(4), replace(TINY, held_out_rows=1))
    handle.remove()
    fine = [z for z in seen if z.shape[1] == 5]
    assert fine
    assert all((z[:, 3:] == 0.25).all() for z in fine)
    assert report.after != report.before


def test_mistakes_are_told(tmp_path: Path) -> None:
    adapter, condition = _adapter(), flux_condition(6)
    with pytest.raises(ConfigError, match="2 latents with held_out_rows = 2"):
        distill(adapter, images(2), condition, TINY)
    for key, value in (
        ("num_steps", 0),
        ("learning_rate", 0.0),
        ("sigma_std", math.nan),
        ("save_every_steps", 3),
        ("report_sigmas", (0.0,)),
    ):
        with pytest.raises(ConfigError, match=key):
            replace(TINY, **{key: value})
    with pytest.raises(TrainingError, match="not finite at step 2"):
        distill(adapter, images(6) * math.nan, condition, TINY)
    often = replace(TINY, log_every_steps=1, save_every_steps=1)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        distill(adapter, images(6) * math.nan, condition, often, folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    distill(_adapter(), images(6), condition, TINY, folder=tmp_path)
    with pytest.raises(CheckpointError, match="its config is"):
        distill(_adapter(), images(6), condition, replace(TINY, seed=1), folder=tmp_path)
    other = PatchAdapter(FluxHost(tiny_flux()), lora_rank=3)
    with pytest.raises(CheckpointError, match="its lora_rank is 2, here it is 3"):
        distill(other, images(6), condition, TINY, folder=tmp_path)
