"""Many numbers per step (experts, layers, ranks) kept in bounded memory for any length of run.

Steps are gathered in bins. A bin keeps the highest, the lowest and the sum of each number, so that
what happened in one step only is still there when a bin is a thousand steps wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
MAX_BINS = 1024
MIN_BINS = 64
MAX_CELLS = 1 << 21
"""Of one of the three matrices of a band: 8 MB."""


class Band:
    """Highest, lowest and mean of ``width`` numbers, binned by step.

    Bins get twice as wide whenever the run outgrows them.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.bin_steps = 1
        self.num_bins = 0
        capacity = max(MIN_BINS, min(MAX_BINS, MAX_CELLS // max(1, width))) // 2 * 2
        self._high = np.full((capacity, width), np.nan, np.float32)
        self._low = self._high.copy()
        self._sum = np.zeros((capacity, width), np.float32)
        self._count = np.zeros(capacity, np.int64)

    def add(self, steps: NDArray[np.int64], values: Matrix, lowest: Matrix | None = None) -> None:
        """Take ``values`` [steps, width] of ascending steps.

        With ``lowest``, ``values`` are the highest of something finer, and both are kept.
        """
        if not len(steps):
            return
        if values.shape[1] != self.width:
            self._widen(max(self.width, values.shape[1]))
            values = _padded(values, self.width)
            lowest = None if lowest is None else _padded(lowest, self.width)
        while steps[-1] // self.bin_steps >= len(self._count):
            self._coarsen()
        bins = steps // self.bin_steps
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        at = bins[starts]
        low = values if lowest is None else lowest
        with np.errstate(invalid="ignore"):
            self._high[at] = np.fmax(self._high[at], np.fmax.reduceat(values, starts, axis=0))
            self._low[at] = np.fmin(self._low[at], np.fmin.reduceat(low, starts, axis=0))
            self._sum[at] += np.add.reduceat(np.nan_to_num(values), starts, axis=0)
        self._count[at] += np.diff(starts, append=len(steps))
        self.num_bins = max(self.num_bins, int(bins[-1]) + 1)

    def abandon(self, step: int) -> None:
        """Forget bins of ``step`` and later. The bin in which it lies keeps what it has seen."""
        first = -(-step // self.bin_steps)
        self._high[first:] = self._low[first:] = np.nan
        self._sum[first:], self._count[first:] = 0, 0
        self.num_bins = min(self.num_bins, first)

    def high(self) -> Matrix:
        """Highest of each bin [bins, width]; NaN where a bin has no line."""
        return self._high[: self.num_bins]

    def low(self) -> Matrix:
        """Lowest of each bin."""
        return self._low[: self.num_bins]

    def mean(self) -> Matrix:
        """Mean of each bin."""
        with np.errstate(invalid="ignore", divide="ignore"):
            counts = self._count[: self.num_bins, None].astype(np.float32)
            return self._sum[: self.num_bins] / counts

    def farthest(self, centre: float) -> Matrix:
        """Of highest and lowest the one that is farther from ``centre``."""
        high, low = self.high(), self.low()
        with np.errstate(invalid="ignore"):
            return np.where(high - centre >= centre - low, high, low)

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that :meth:`from_state` restores."""
        return {
            "high": self.high(),
            "low": self.low(),
            "sum": self._sum[: self.num_bins],
            "count": self._count[: self.num_bins],
            "bin_steps": np.array(self.bin_steps),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]]) -> Band:
        """The band whose :meth:`state` was saved."""
        band = cls(arrays["high"].shape[1])
        band.num_bins, band.bin_steps = len(arrays["count"]), int(arrays["bin_steps"])
        band._high[: band.num_bins], band._low[: band.num_bins] = arrays["high"], arrays["low"]
        band._sum[: band.num_bins], band._count[: band.num_bins] = arrays["sum"], arrays["count"]
        return band

    def _coarsen(self) -> None:
        half = len(self._count) // 2
        merges = ((self._high, np.fmax), (self._low, np.fmin), (self._sum, np.add))
        for matrix, merge in merges:
            matrix[:half] = merge(matrix[0::2], matrix[1::2])
            matrix[half:] = 0 if merge is np.add else np.nan
        self._count[:half] = self._count[0::2] + self._count[1::2]
        self._count[half:] = 0
        self.bin_steps *= 2
        self.num_bins = (self.num_bins + 1) // 2

    def _widen(self, width: int) -> None:
        self.width = width
        self._high, self._low = _padded(self._high, width), _padded(self._low, width)
        self._sum = np.nan_to_num(_padded(self._sum, width))


def _padded(matrix: Matrix, width: int) -> Matrix:
    missing = width - matrix.shape[1]
    return np.pad(matrix, ((0, 0), (0, missing)), constant_values=np.nan) if missing else matrix
