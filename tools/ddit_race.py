"""Times ways to sample against one another: they take turns, and the least CPU time counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping


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
