"""By what ranks are compared: a fixed piece of work, and how long a rank waits for the others.

The work needs no other rank, so that a slow one cannot hide behind those that wait for it: it shows
a slow processor. Whatever else makes a rank late (storage, an interpreter that is busy with other
things) shows in a sum over all ranks: the last to come to it is the one that does not wait.

Times on a GPU are found by events in its queue, and read when they have long passed: nothing waits.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PIECES = 6
CPU_SIZE, CPU_PRODUCTS = 384, 2
"""A piece takes a few milliseconds, about as long as a scheduler lets a process run: whoever shares
its core is interrupted in nearly every piece."""
GPU_SIZE, GPU_PRODUCTS = 2048, 16


class FixedWork:
    """Does the work, and knows how long it took.

    The time is that of an average piece. The slowest is left out: one interrupt, which may hit any
    rank at any time, changes nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds = float("nan")
        """Of the last work that is known to have ended; NaN before the first."""
        self._events: list[torch.cuda.Event] = []

    def run(self) -> None:
        """Do it. On a GPU it is put in the queue, and nobody waits for it."""
        if self.device.type == "cuda":
            self.read()
            self._run_on_gpu()
        else:
            self._run_on_cpu()

    def read(self) -> float:
        """Milliseconds of the last work; on a GPU of an earlier one if that has not ended yet."""
        if self._events and self._events[-1].query():
            pairs = itertools.pairwise(self._events)
            self.milliseconds = typical([first.elapsed_time(last) for first, last in pairs])
            self._events = []
        return self.milliseconds

    def _run_on_cpu(self) -> None:
        step = _products(self.device, CPU_SIZE, CPU_PRODUCTS, torch.float32)
        durations_ms = []
        for _ in range(PIECES):
            start_s = time.perf_counter()
            step()
            durations_ms.append((time.perf_counter() - start_s) * 1e3)
        self.milliseconds = typical(durations_ms)

    def _run_on_gpu(self) -> None:
        step = _products(self.device, GPU_SIZE, GPU_PRODUCTS, torch.bfloat16)
        step()  # what the queue was busy with before is not to be counted
        events = [torch.cuda.Event(enable_timing=True) for _ in range(PIECES + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        self._events = events


class Waiting:
    """How long this rank is in a collective: it waits for the last rank, then data travel."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds = float("nan")
        """Of the last wait that is known to have ended; NaN before the first."""
        self._events: list[torch.cuda.Event] = []

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around the collective."""
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self.milliseconds = (time.perf_counter() - start_s) * 1e3
            return
        self.read()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        yield
        events[1].record()
        self._events = events

    def read(self) -> float:
        """Milliseconds of the last wait; on a GPU of an earlier one if that has not ended yet."""
        if self._events and self._events[-1].query():
            self.milliseconds = self._events[0].elapsed_time(self._events[1])
            self._events = []
        return self.milliseconds


def _products(
    device: torch.device, size: int, count: int, dtype: torch.dtype
) -> Callable[[], None]:
    a: Tensor = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)

    def step() -> None:
        for _ in range(count):
            torch.mm(a, a, out=out)

    return step


def typical(durations_ms: list[float]) -> float:
    """The mean of all but the longest."""
    kept = sorted(durations_ms)[:-1]
    return sum(kept) / len(kept)
