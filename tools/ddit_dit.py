"""What dynamic patches gain on our own diffusion transformer, trained with several patch sizes.

Draws the same digits from the same noise in many ways: as the run's configuration says, in fewer
steps, coarse to fine at fixed steps, coarse from pooled latents, with a patch size per step and
image, with a cache, with both; all on one thread, in process CPU time.

    python -m tools.dit_digits --keep RUN_DIR train.num_steps=1500 schedule.decay_steps=500
    python -m tools.ddit_dit RUN_DIR --images 400 --save    # the table and the curve of the docs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from tools.ddit_race import judged, race
from tools.ddit_table import save_picture, show_table
from trinity.ckpt.load import load_run_dit
from trinity.core.draws import Stream, normal_by_row
from trinity.core.image_run_config import ImageRunConfig, SamplesConfig
from trinity.core.load_config import load_image_config
from trinity.core.run_files import CONFIG_FILE
from trinity.data.build import TRAIN
from trinity.data.images import build_images
from trinity.models.dit import DiffusionTransformer
from trinity.models.flops import forward_flops_per_token
from trinity.models.flow import euler, sampling_sigmas
from trinity.models.host_dit import DiTHost
from trinity.models.patch_sampler import (
    FixedSplit,
    PatchedVelocity,
    PatchPolicy,
    PatchRecord,
    pooled_velocity,
)
from trinity.train.feature_network import feature_network, labelled_images
from trinity.train.sample_conditions import class_columns, no_condition
from trinity.train.sample_images import SAMPLING, Drawn, sample, scheduler

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results/ddit_dit.json"
PICTURE = ROOT / "docs/images/ddit-dit.png"
CACHES = (0.1, 0.2)
TAU_QUANTILES = (0.25, 0.5, 0.8, 0.95)
"""Of the statistic of runs at the base patch: thresholds that are passed that often there."""
BATCH_IMAGES, RACE_IMAGES = 50, 20


class Method(NamedTuple):
    """A way to sample."""

    name: str
    kind: str
    policy: PatchPolicy
    num_steps: int
    is_pooled: bool = False
    cache: float = 0.0
    """Threshold of the first block cache."""


def thresholds(model: DiffusionTransformer, config: ImageRunConfig, cache: float) -> list[float]:
    """From a few runs at the base patch, with the cache: the calls it skips bend the path too."""
    settings = config.samples.model_copy(update={"tau": 0.0, "cache": cache})
    rule = scheduler(config, settings)
    classes = class_columns(config, range(config.model.num_classes), 2)
    drawn = sample(model, config, classes, settings=settings, seed=7, policy=rule)
    known = drawn.record.statistic_KBS[rule.min_fine_first : -rule.min_fine_last, :, 0]
    return torch.quantile(known.flatten(), torch.tensor(TAU_QUANTILES).to(known)).tolist()


def methods(model: DiffusionTransformer, config: ImageRunConfig) -> Iterator[Method]:
    """All that are compared; the first is what the others are measured against."""
    steps, fine = config.samples.num_steps, FixedSplit(())
    yield Method("all fine", "base", fine, steps)
    for fewer in (steps // 2, steps // 3, steps // 4):
        yield Method(f"{fewer} steps", "fewer steps", fine, fewer)
    for share in (0.4, 0.6, 0.8):
        split = FixedSplit(((2, share),))
        yield Method(f"split {share:.0%} at 2x", "fixed split", split, steps)
    yield Method("pooled 40% at 2x", "pooled", FixedSplit(((2, 0.4),)), steps, is_pooled=True)
    for cache in CACHES:
        yield Method(f"cache {cache:g}", "cache", fine, steps, cache=cache)
    for cache in (0.0, *CACHES):
        tail = f" + cache {cache:g}" if cache else ""
        for quantile, tau in zip(TAU_QUANTILES, thresholds(model, config, cache), strict=True):
            rule = scheduler(config, config.samples.model_copy(update={"tau": tau}))
            name, kind = f"dynamic q{quantile:g}{tail}", f"dynamic{tail}"
            yield Method(name, kind, rule, steps, cache=cache)


def draw(
    method: Method, model: DiffusionTransformer, config: ImageRunConfig, classes: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """All images, and what went through the model.

    ``token_share`` is against all steps at the base patch; tokens of steps that the cache skipped
    count too, in ``gflops`` with their first block alone, all blocks taken to be as dear.
    """
    parts = [
        _batch(method, model, config, classes[i : i + BATCH_IMAGES], seed=100 + i)
        for i in range(0, len(classes), BATCH_IMAGES)
    ]
    scale_KB = torch.cat([part.record.scale_KB for part in parts], dim=1)
    tokens = torch.cat([part.record.tokens_KB for part in parts], dim=1).sum(0).double().mean()
    forwards = 2 if config.samples.guidance != 1 else 1
    flops = forward_flops_per_token(config.model, config.tokens_of_image)
    layers, computed = config.model.num_hidden_layers, sum(part.computed for part in parts)
    share = (1 + (layers - 1) * computed / len(parts)) / layers
    return torch.cat([part.images for part in parts]), {
        "token_share": float(tokens) / (config.tokens_of_image * config.samples.num_steps),
        "gflops": forwards * float(tokens) * flops * share / 1e9,
        "switches": float((scale_KB[1:] != scale_KB[:-1]).sum(0).double().mean()),
    }


def _batch(
    method: Method,
    model: DiffusionTransformer,
    config: ImageRunConfig,
    classes: Tensor,
    *,
    seed: int,
) -> Drawn:
    changes = {"num_steps": method.num_steps, "tau": 0.0, "cache": method.cache}
    settings = config.samples.model_copy(update=changes)
    if not method.is_pooled:
        return sample(model, config, classes, settings=settings, seed=seed, policy=method.policy)
    with torch.inference_mode():
        return _pooled(method, model, config, settings, classes, seed=seed)


def _pooled(
    method: Method,
    model: DiffusionTransformer,
    config: ImageRunConfig,
    settings: SamplesConfig,
    classes: Tensor,
    *,
    seed: int,
) -> Drawn:
    """Coarse steps on pooled latents, at the model's own patch, guided like the others."""
    host, none = DiTHost(model), no_condition(config, classes)
    with_class, without = pooled_velocity(host, classes), pooled_velocity(host, none)

    def guided(z: Tensor, sigma: float, scale: int, rows_N: Tensor) -> Tensor:
        base = without(z, sigma, scale, rows_N)
        return base + settings.guidance * (with_class(z, sigma, scale, rows_N) - base)

    velocity = PatchedVelocity(guided, method.policy, settings.num_steps)
    shape = (config.model.channels, *config.images.extent())
    noise = normal_by_row(seed, SAMPLING, range(len(classes)), shape, Stream.NOISE)
    *_, z = euler(velocity, noise, sampling_sigmas(settings.num_steps, config.flow.shift))
    record: PatchRecord = velocity.path.record(config.tokens_of_image)
    return Drawn(z, record)


def main() -> None:
    """Draw with every method, compare, print; save where asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--save", action="store_true", help="write the files of the docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_image_config(options.run / CONFIG_FILE)
    dataset = build_images(config.images, channels=config.model.channels, seed=config.seed)
    network = feature_network(dataset, config.images.cache_dir)
    real, _ = labelled_images(dataset, TRAIN, options.images)
    model = load_run_dit(options.run, average=True)
    num_classes = config.model.num_classes
    classes = class_columns(config, range(num_classes), options.images // num_classes)
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    ways = list(methods(model, config))
    for method in ways:
        drawn, cost = draw(method, model, config, classes)
        quality = judged(drawn, real, network, classes, reference)
        reference = drawn if reference is None else reference
        rows.append({"name": method.name, "kind": method.kind, **cost, **quality})
        print(json.dumps(rows[-1]), flush=True)
    few = classes[:RACE_IMAGES]
    draws = {way.name: partial(_batch, way, model, config, few, seed=100) for way in ways}
    times = race(draws, num_images=len(few))
    rows = [{**row, **times[row["name"]]} for row in rows]
    show_table(rows, Console(width=160), title="Sampling digits of 16 x 16 with dit_tiny")
    if options.save:
        setting = {
            "images": len(classes),
            "train_steps": config.train.num_steps,
            "guidance": config.samples.guidance,
        }
        result = {"setting": setting, "methods": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        save_picture(rows, PICTURE)


if __name__ == "__main__":
    main()
