"""What dynamic patches gain on a model of diffusers: time, tokens and quality against its rivals.

Trains a small FluxTransformer2DModel on digits, distils a patch adapter for it, and turns the same
noise into digits in many ways: as it is, in fewer steps, coarse to fine at fixed steps, coarse
without any training, with a cache, with dynamic patches, with both; all on one thread.

    python -m tools.ddit_flux WORK_DIR            # some 20 CPU minutes at a time; run until done
    python -m tools.ddit_flux WORK_DIR --save     # then: the table and the curve of the docs

Every stage leaves its result in WORK_DIR and is not done twice. To be timed, all take turns on one
batch; the least CPU time counts, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from tools.ddit_methods import (
    EDGE,
    NUM_CLASSES,
    SCALES,
    TEXT_WIDTH,
    condition_of,
    draw,
    methods,
    race_of,
)
from tools.ddit_race import judged
from tools.ddit_table import save_picture, show_table
from trinity.core.draws import Stream, generator_for, normal_by_row
from trinity.models.flow import SigmaDensity, interpolate, training_sigmas
from trinity.models.host_flux import PACKED_EDGE, FluxHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.train.distill import DistillConfig, distill
from trinity.train.feature_network import train_feature_network

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results/ddit_flux.json"
PICTURE = ROOT / "docs/images/ddit-flux.png"

NUM_TRAIN = 897
"""Of 1797 digits; the others judge."""
SEED = 0
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
    held_out = pixels[NUM_TRAIN:][: setting.num_images]
    times_path = folder / "times.json"
    if not times_path.is_file():
        times_path.write_text(json.dumps(race_of(adapter)))
    times = json.loads(times_path.read_text())
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
        quality = judged(drawn, held_out, network, labels, reference)
        reference = drawn if reference is None else reference
        cost = {**times[method.name], **json.loads(row_path.read_text())}
        rows.append({"name": method.name, "kind": method.kind, **cost, **quality})
        print(json.dumps(rows[-1]), flush=True)
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
    parser.add_argument("--distill-steps", type=int, default=3000)
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
