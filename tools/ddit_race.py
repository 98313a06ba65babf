"""Holds ways to sample against one another: what they take, and how good what they draw is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from trinity.train.feature_network import FeatureNetwork, compare_sets
from trinity.train.quality import psnr, ssim


def race(
    draws: Mapping[str, Callable[[], object]], *, num_images: int, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Least milliseconds per image, of the process and by the clock, of each way to draw a batch.

    Turns, because a machine is not as fast now as it was then; the least, because other work on it
    only ever adds.
    """
    best = {name: {"cpu_ms": math.inf, "wall_ms": math.inf} for name in draws}
    for _ in range(rounds):
        for name, draw in draws.items():
            before = time.process_time(), time.monotonic()
            draw()
            spent_s = time.process_time() - before[0], time.monotonic() - before[1]
            for key, seconds in zip(("cpu_ms", "wall_ms"), spent_s, strict=True):
                best[name][key] = min(best[name][key], 1e3 * seconds / num_images)
    return best


def judged(
    drawn: Tensor, real: Tensor, network: FeatureNetwork, labels: Tensor, reference: Tensor | None
) -> dict[str, float]:
    """Distances to real images, and likeness to what the ``reference`` drew from the same noise."""
    quality = compare_sets(drawn, real, network, labels=labels)
    if reference is not None:
        quality["psnr"] = float(psnr(drawn, reference).mean())
        quality["ssim"] = float(ssim(drawn, reference).mean())
    return quality
