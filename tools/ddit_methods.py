"""The ways to sample that :mod:`tools.ddit_flux` compares, and what each of them costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tools.ddit_race import race
from trinity.core.draws import Stream, normal_by_row
from trinity.models.flow import euler, sampling_sigmas
from trinity.models.host_flux import PACKED_EDGE, FluxCondition, FluxHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_pipeline import DynamicTransformer
from trinity.models.patch_sampler import (
    FixedSplit,
    PatchedVelocity,
    PatchPolicy,
    PatchRecord,
    pooled_velocity,
)
from trinity.models.patch_scheduler import PatchScheduler, calibrate_tau
from trinity.models.patching import patch_centres, unpatchify

EDGE = 32
NUM_CLASSES = 10
TEXT_WIDTH = 8
SCALES = (1, 2, 4)
NUM_STEPS = 50
NOISE_SEED = 1
SHIFT = 3.0
"""Of the noise levels, as FLUX has it: most steps at high noise."""
RULE = PatchScheduler(0.0, sizes=SCALES, normalize="raw")
"""Raw differences rise towards the end of a shifted schedule, where detail is made."""
CACHES = (0.1, 0.2)
"""Thresholds of the first block cache."""
DYNAMIC = (
    (2, (33, 40, 44), (None,)),
    (4, (25, 33, 40, 44), (None,)),
    (2, (40, 44), CACHES),
    (4, (40,), CACHES),
)
"""Largest size, where coarse steps should end, and caches."""
BATCH_IMAGES = 20
CALIBRATION_FIRST = 1_000_000
"""Of the images that thresholds are found on: none that is judged."""


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


def condition_of(labels: Tensor) -> FluxCondition:
    """A class as the embedding of a prompt."""
    classes = F.one_hot(labels, NUM_CLASSES).float() * math.sqrt(NUM_CLASSES)
    return FluxCondition(torch.zeros(len(labels), 1, TEXT_WIDTH), classes)


def methods(adapter: PatchAdapter) -> Iterator[Method]:
    """All that are compared; the first is what the others are measured against."""
    fine = FixedSplit(())
    yield Method("all fine", "base", fine)
    for num_steps in (25, 17):
        yield Method(f"{num_steps} steps", "fewer steps", fine, num_steps=num_steps)
    for name, stages in (
        ("2x to 25", ((2, 0.5),)),
        ("2x to 40", ((2, 0.8),)),
        ("4x to 15, 2x to 35", ((4, 0.3), (2, 0.4))),
        ("4x to 30, 2x to 40", ((4, 0.6), (2, 0.2))),
    ):
        yield Method(f"split {name}", "fixed split", FixedSplit(stages))
    for name, stages in (("2x to 25", ((2, 0.5),)), ("4x to 5, 2x to 35", ((4, 0.1), (2, 0.6)))):
        yield Method(f"pooled {name}", "pooled", FixedSplit(stages), is_pooled=True)
    for cache in CACHES:
        yield Method(f"cache {cache:g}", "cache", fine, cache=cache)
    statistics = {cache: fine_statistic(adapter, cache) for cache in (None, *CACHES)}
    for largest, stop_steps, caches in DYNAMIC:
        scales = tuple(scale for scale in SCALES if scale <= largest)
        for stop_step, cache in product(stop_steps, caches):
            tau = calibrate_tau(statistics[cache], stop_step)
            rule = replace(RULE, tau=tau, sizes=scales)
            tail = "" if cache is None else f" + cache {cache:g}"
            kind, name = f"dynamic {largest}x{tail}", f"dynamic {largest}x to {stop_step}{tail}"
            yield Method(name, kind, rule, cache=cache)


def fine_statistic(adapter: PatchAdapter, cache: float | None) -> Tensor:
    """What the rule reads on a few runs at the base patch, (K, B): thresholds come from it.

    With the cache, because calls that it skips bend the path too.
    """
    never = Method("calibration", "dynamic", RULE, cache=cache)
    with _cached(never, adapter), torch.no_grad():
        _, record = draw_batch(never, adapter, CALIBRATION_FIRST)
    return record.statistic_KBS[..., 0]


def _noise(first: int) -> Tensor:
    rows = range(first, first + BATCH_IMAGES)
    return normal_by_row(NOISE_SEED, 0, rows, (1, EDGE, EDGE), Stream.NOISE)


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


@contextmanager
def _cached(method: Method, adapter: PatchAdapter) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig

    model: Any = adapter.host.base
    if method.cache is None:
        yield
        return
    model.enable_cache(FirstBlockCacheConfig(threshold=method.cache))
    try:
        yield
    finally:
        model.disable_cache()


@torch.no_grad()
def draw(method: Method, adapter: PatchAdapter, num_images: int) -> tuple[Tensor, dict[str, Any]]:
    """Latents of all images, and what went through the model.

    ``token_share`` is against all steps at the base patch; tokens of steps that a cache skipped
    count too, operations (``gflops``) do not.
    """
    with _cached(method, adapter):
        starts = range(0, num_images, BATCH_IMAGES)
        batches = [draw_batch(method, adapter, first) for first in starts]
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            draw_batch(method, adapter, 0)
    scale_KB = torch.cat([record.scale_KB for _, record in batches], dim=1)
    tokens_KB = torch.cat([record.tokens_KB for _, record in batches], dim=1)
    full = NUM_STEPS * adapter.host.geometry.num_tokens((EDGE, EDGE))
    return torch.cat([latents for latents, _ in batches])[:num_images], {
        "token_share": float(tokens_KB.sum(dim=0).double().mean()) / full,
        "gflops": counter.get_total_flops() / BATCH_IMAGES / 1e9,
        "switches": float((scale_KB[1:] != scale_KB[:-1]).sum(dim=0).double().mean()),
        "share_of_steps": {
            str(scale): float((scale_KB == scale).double().mean()) for scale in SCALES
        },
    }


@torch.no_grad()
def race_of(adapter: PatchAdapter) -> dict[str, dict[str, float]]:
    """What each method takes for an image; see :func:`tools.ddit_race.race`."""

    def one_batch(method: Method) -> None:
        with _cached(method, adapter):
            draw_batch(method, adapter, 0)

    draws = {method.name: partial(one_batch, method) for method in methods(adapter)}
    return race(draws, num_images=BATCH_IMAGES)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (B, H, S, d): two products of S x S."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[-2] * width


ATTENTION_FLOPS = {
    # Counted as nothing by default.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}
