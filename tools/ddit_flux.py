"""What dynamic patches gain on a model of diffusers: time, tokens and quality against its rivals.

Trains a small FluxTransformer2DModel on digits, distils a patch adapter for it, and turns the same
noise into digits in many ways: as it is, in fewer steps, coarse to fine at fixed steps, coarse
without any training, with a cache, with dynamic patches, with both; all on one thread.

    python -m tools.ddit_flux WORK_DIR            # some 20 CPU minutes at a time; run until done
    python -m tools.ddit_flux WORK_DIR --save     # then: the table and the curve of the docs

Every stage leaves its result in WORK_DIR and is not done twice. Seconds are of the process's CPU
time, which other work on the machine hardly disturbs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tools.ddit_table import save_picture, show_table
from trinity.core.draws import Stream, generator_for, normal_by_row
from trinity.models.flow import SigmaDensity, euler, interpolate, sampling_sigmas, training_sigmas
from trinity.models.host_flux import PACKED_EDGE, FluxCondition, FluxHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_pipeline import DynamicTransformer
from trinity.models.patch_sampler import (
    FixedSplit,
    PatchedVelocity,
    PatchPolicy,
    PatchRecord,
    adapter_velocity,
    pooled_velocity,
    sample,
)
from trinity.models.patch_scheduler import PatchScheduler, calibrate_tau
from trinity.models.patching import patch_centres, unpatchify
from trinity.train.distill import DistillConfig, distill
from trinity.train.feature_network import compare_sets, train_feature_network
from trinity.train.quality import psnr, ssim

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results/ddit_flux.json"
PICTURE = ROOT / "docs/images/ddit-flux.png"

EDGE = 32
NUM_CLASSES = 10
NUM_TRAIN = 897
"""Of 1797 digits; the others judge."""
TEXT_WIDTH = 8
SCALES = (1, 2, 4)
NUM_STEPS = 50
SEED = 0
SHIFT = 3.0
"""Of the noise levels, as FLUX has it: most steps at high noise."""
STOP_STEPS = (25, 33, 40, 44)
"""Where coarse steps should end, by thresholds found on runs at the base patch."""
RULE = PatchScheduler(0.0, sizes=SCALES, normalize="raw")
"""Raw differences rise towards the end of a shifted schedule, where detail is made."""
BATCH_IMAGES = 20

LR, TRAIN_ROWS, SAVE_EVERY_STEPS = 1.5e-3, 16, 50


class Setting(NamedTuple):
    """How much is done."""

    train_steps: int
    distill_steps: int
    num_images: int
    minutes: float


class Digits(NamedTuple):
    """Latents of unit variance, their classes, and the way back to pixels in [-1, 1]."""

    latents: Tensor
    labels: Tensor
    mean: float
    std: float

    def pixels(self, latents: Tensor) -> Tensor:
        """What the latents show."""
        return (latents * self.std + self.mean).clamp(-1, 1)


class Method(NamedTuple):
    """A way to sample."""

    name: str
    kind: str
    policy: PatchPolicy
    num_steps: int = NUM_STEPS
    cache: float | None = None
    """Threshold of the first block cache."""
    is_pooled: bool = False
    """Coarse by pooled latents, without the adapter."""


class OutOfTimeError(Exception):
    """The time of this call is spent; the next one goes on."""


def digits() -> Digits:
    """scikit-learn's digits at 32 x 32, in a fixed order."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.from_numpy(generator_for(SEED, 0, 0, Stream.CROP).permutation(len(small)))
    x = F.interpolate(small, size=(EDGE, EDGE), mode="bilinear")[order]
    mean, std = float(x.mean()), float(x.std())
    return Digits((x - mean) / std, torch.tensor(bunch.target)[order], mean, std)


def condition_of(labels: Tensor) -> FluxCondition:
    """A class as the embedding of a prompt."""
    classes = F.one_hot(labels, NUM_CLASSES).float() * math.sqrt(NUM_CLASSES)
    return FluxCondition(torch.zeros(len(labels), 1, TEXT_WIDTH), classes)


def new_model() -> nn.Module:
    """256 tokens of width 96: the blocks, not the calls, are what takes the time."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(SEED)
    return FluxTransformer2DModel(
        in_channels=PACKED_EDGE**2,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=NUM_CLASSES,
        axes_dims_rope=(4, 10, 10),
    )


def trained_model(data: Digits, work: Path, setting: Setting, deadline_s: float) -> nn.Module:
    """Train by flow matching, or go on, or read what was trained."""
    model, path = new_model(), work / "model.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    host, density = FluxHost(model), SigmaDensity(shift=1.5)
    for step in range(first, setting.train_steps):
        draws = generator_for(SEED, step, 0, Stream.CONDITION)
        rows = torch.from_numpy(draws.integers(0, NUM_TRAIN, TRAIN_ROWS))
        x = data.latents[rows]
        eps = normal_by_row(SEED, step, range(TRAIN_ROWS), x.shape[1:], Stream.NOISE)
        sigma_B = training_sigmas(SEED, step, range(TRAIN_ROWS), density)
        velocity = host.velocity(
            interpolate(x, eps, sigma_B), sigma_B, condition_of(data.labels[rows])
        )
        loss = (velocity - (eps - x)).square().mean()
        share = 0.5 * (1 + math.cos(math.pi * step / setting.train_steps))
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 100) * max(share, 0.02)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == setting.train_steps:
            print(f"step {step + 1}/{setting.train_steps}: loss {float(loss.detach()):.4f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            check_time(deadline_s)
    return model.eval().requires_grad_(False)


def distilled_adapter(
    model: nn.Module, data: Digits, work: Path, setting: Setting
) -> tuple[PatchAdapter, dict[str, Any]]:
    """Distil the adapter, or go on, or read it; and its errors by size and noise level."""
    adapter = PatchAdapter(FluxHost(model), SCALES, init="sub_patch_average")
    config = DistillConfig(
        num_steps=setting.distill_steps,
        batch_rows=TRAIN_ROWS,
        lora_learning_rate=1e-3,
        save_every_steps=SAVE_EVERY_STEPS,
    )
    condition = condition_of(data.labels[:NUM_TRAIN])
    folder = work / "distill"
    report = distill(adapter, data.latents[:NUM_TRAIN], condition, config, folder=folder)
    return adapter, {str(scale): errors for scale, errors in report.after.items()}


def methods(adapter: PatchAdapter) -> Iterator[Method]:
    """All that are compared; the first is what the others are measured against."""
    fine = FixedSplit(())
    yield Method("all fine", "base", fine)
    for num_steps in (25, 17):
        yield Method(f"{num_steps} steps", "fewer steps", fine, num_steps=num_steps)
    for name, stages in (
        ("2x to 25", ((2, 0.5),)),
        ("4x to 15, 2x to 35", ((4, 0.3), (2, 0.4))),
        ("4x to 30, 2x to 40", ((4, 0.6), (2, 0.2))),
    ):
        yield Method(f"split {name}", "fixed split", FixedSplit(stages))
    for name, stages in (("2x to 25", ((2, 0.5),)), ("4x to 5, 2x to 35", ((4, 0.1), (2, 0.6)))):
        yield Method(f"pooled {name}", "pooled", FixedSplit(stages), is_pooled=True)
    for threshold in (0.1, 0.2):
        yield Method(f"cache {threshold:g}", "cache", fine, cache=threshold)
    for stop_step, tau in zip(STOP_STEPS, thresholds(adapter), strict=True):
        scheduler = replace(RULE, tau=tau)
        yield Method(f"dynamic to {stop_step}", "dynamic", scheduler)
        for threshold in (0.1, 0.2):
            name = f"dynamic to {stop_step} + cache {threshold:g}"
            yield Method(name, "dynamic + cache", scheduler, cache=threshold)


@torch.no_grad()
def thresholds(adapter: PatchAdapter) -> list[float]:
    """One for each of ``STOP_STEPS``, from a few runs at the base patch."""
    labels = torch.arange(BATCH_IMAGES) % NUM_CLASSES
    velocity = adapter_velocity(adapter, condition_of(labels))
    sigmas = sampling_sigmas(NUM_STEPS, SHIFT)
    record = sample(velocity, _noise(0), sigmas, RULE, adapter.host.geometry).record
    return [calibrate_tau(record.statistic_KBS[..., 0], stop_step) for stop_step in STOP_STEPS]


def _noise(first: int) -> Tensor:
    rows = range(first, first + BATCH_IMAGES)
    return normal_by_row(SEED + 1, 0, rows, (1, EDGE, EDGE), Stream.NOISE)


def draw_batch(method: Method, adapter: PatchAdapter, first: int) -> tuple[Tensor, PatchRecord]:
    """Latents of one batch, by a loop as a pipeline has it."""
    host, z = adapter.host, _noise(first)
    assert isinstance(host, FluxHost)
    labels = torch.arange(first, first + len(z)) % NUM_CLASSES
    condition, sigmas = condition_of(labels), sampling_sigmas(method.num_steps, SHIFT)
    num_tokens = host.geometry.num_tokens((EDGE, EDGE))
    if method.is_pooled:
        velocity = PatchedVelocity(
            pooled_velocity(host, condition), method.policy, method.num_steps
        )
        *_, latents = euler(velocity, z, sigmas)
        return latents, velocity.path.record(num_tokens)
    dynamic = DynamicTransformer(host.base, adapter, method.policy, num_steps=method.num_steps)
    grid = patch_centres((EDGE // PACKED_EDGE, EDGE // PACKED_EDGE), 1)
    tokens = host.write_sample(z)
    for sigma, after in pairwise(sigmas):
        with dynamic.cache_context("cond"):
            velocity = dynamic(
                hidden_states=tokens,
                timestep=torch.full((len(z),), sigma),
                encoder_hidden_states=condition.prompt_BSD,
                pooled_projections=condition.pooled_BD,
                img_ids=F.pad(grid, (1, 0)),
                txt_ids=torch.zeros(1, 3),
                return_dict=False,
            )[0]
        tokens = tokens + (after - sigma) * velocity
    record = dynamic.record()
    dynamic.reset()
    return unpatchify(tokens, (EDGE, EDGE), PACKED_EDGE), record


@torch.no_grad()
def draw(method: Method, adapter: PatchAdapter, num_images: int) -> tuple[Tensor, dict[str, Any]]:
    """Latents of all images, and what they cost."""
    from diffusers import FirstBlockCacheConfig

    model: Any = adapter.host.base
    if method.cache is not None:
        model.enable_cache(FirstBlockCacheConfig(threshold=method.cache))
    draw_batch(method, adapter, 0)  # to warm up
    batches, records = [], []
    began_s, began_wall_s = time.process_time(), time.monotonic()
    for first in range(0, num_images, BATCH_IMAGES):
        latents, record = draw_batch(method, adapter, first)
        batches.append(latents)
        records.append(record)
    cpu_s, wall_s = time.process_time() - began_s, time.monotonic() - began_wall_s
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        draw_batch(method, adapter, 0)
    if method.cache is not None:
        model.disable_cache()
    scale_KB = torch.cat([record.scale_KB for record in records], dim=1)
    tokens_KB = torch.cat([record.tokens_KB for record in records], dim=1)
    full = NUM_STEPS * adapter.host.geometry.num_tokens((EDGE, EDGE))
    cost = {
        "cpu_ms": 1e3 * cpu_s / num_images,
        "wall_ms": 1e3 * wall_s / num_images,
        "token_share": float(tokens_KB.sum(dim=0).double().mean()) / full,
        "gflops": counter.get_total_flops() / BATCH_IMAGES / 1e9,
        "switches": float((scale_KB[1:] != scale_KB[:-1]).sum(dim=0).double().mean()),
        "share_of_steps": {
            str(scale): float((scale_KB == scale).double().mean()) for scale in SCALES
        },
    }
    return torch.cat(batches), cost


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (B, H, S, d): two products of S x S."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[-2] * width


ATTENTION_FLOPS = {
    # Counted as nothing by default.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


def measured(
    work: Path, data: Digits, adapter: PatchAdapter, setting: Setting, deadline_s: float
) -> list[dict[str, Any]]:
    """Draw with every method that has not been drawn with yet, and compare."""
    rows: list[dict[str, Any]] = []
    folder = work / f"drawn-{setting.num_images}"
    folder.mkdir(exist_ok=True)
    pixels = data.pixels(data.latents)
    network = train_feature_network(
        pixels[:NUM_TRAIN], data.labels[:NUM_TRAIN], num_classes=NUM_CLASSES
    )
    labels = torch.arange(setting.num_images) % NUM_CLASSES
    reference: Tensor | None = None
    for method in methods(adapter):
        name = method.name.replace(" ", "-")
        row_path, drawn_path = folder / f"{name}.json", folder / f"{name}.pt"
        if not row_path.is_file():
            check_time(deadline_s)
            latents, cost = draw(method, adapter, setting.num_images)
            torch.save(latents, drawn_path)
            row_path.write_text(json.dumps(cost))
        drawn = data.pixels(torch.load(drawn_path, weights_only=True))
        reference = drawn if reference is None else reference
        held_out = pixels[NUM_TRAIN:][: setting.num_images]
        quality = compare_sets(drawn, held_out, network, labels=labels)
        if method.kind != "base":
            quality |= {"psnr": float(psnr(drawn, reference).mean())}
            quality |= {"ssim": float(ssim(drawn, reference).mean())}
        cost = json.loads(row_path.read_text())
        rows.append({"name": method.name, "kind": method.kind, **cost, **quality})
        print(json.dumps(rows[-1]))
    return rows


def check_time(deadline_s: float) -> None:
    """Raise OutOfTimeError when this call has had its CPU time."""
    if time.process_time() > deadline_s:
        raise OutOfTimeError


def main() -> None:
    """Do what is left to do, until the time is spent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--train-steps", type=int, default=4000)
    parser.add_argument("--distill-steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU time of this call")
    parser.add_argument("--save", action="store_true", help="write the files of the docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        arguments.train_steps, arguments.distill_steps, arguments.images, arguments.minutes
    )
    deadline_s, data = time.process_time() + 60 * setting.minutes, digits()
    try:
        model = trained_model(data, work, setting, deadline_s)
        adapter, errors = distilled_adapter(model, data, work, setting)
        check_time(deadline_s)
        rows = measured(work, data, adapter, setting, deadline_s)
    except OutOfTimeError:
        print("this call's time is spent: run the same command again to go on")
        return
    title = "Sampling digits of 32 x 32 with a small FLUX model"
    show_table(rows, Console(width=160), title=title)
    results = {"setting": setting._asdict(), "relative_errors": errors, "methods": rows}
    (work / "results.json").write_text(json.dumps(results, indent=1))
    if arguments.save:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        save_picture(rows, PICTURE)
    else:
        save_picture(rows, work / "curve.png")


if __name__ == "__main__":
    main()
