"""Fewer points for the same picture: every lowest and every highest value stays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trinity.core.errors import ConfigError

Floats = NDArray[np.float64]


def pick(x: Floats, y: Floats, points: int) -> NDArray[np.int64]:
    """Indices of at most ``points`` finite values: lowest and highest of equal pieces of ``x``.

    A picked point is a measured one, so a spike of a single step keeps its step and height.

    Raises:
        ConfigError: the package tsdownsample is missing.
    """
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) <= points:
        return finite
    try:
        from tsdownsample import MinMaxDownsampler
    except ImportError:
        raise ConfigError(
            "trinity monitor needs tsdownsample; pip install 'trinity-pretrain[monitor]'"
        ) from None
    everywhere = len(finite) == len(y)
    xs = np.ascontiguousarray(x if everywhere else x[finite])
    ys = np.ascontiguousarray(y if everywhere else y[finite])
    picked = MinMaxDownsampler().downsample(xs, ys, n_out=points // 2 * 2).astype(np.int64)
    return finite[picked]


def bucket_means(x: Floats, y: Floats, buckets: int) -> tuple[Floats, Floats]:
    """Mean of finite values in at most ``buckets`` runs of neighbours, at the middle of their x."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= buckets:
        return np.asarray(x), np.asarray(y)
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    sizes = np.diff(edges)
    return (
        np.add.reduceat(x, edges[:-1]) / sizes,
        np.add.reduceat(y, edges[:-1]) / sizes,
    )


def window(x: Floats, start: float, end: float) -> slice:
    """Where ascending ``x`` lies in [start, end], with one neighbour on each side."""
    low = int(np.searchsorted(x, start))
    high = int(np.searchsorted(x, end, "right"))
    return slice(max(0, low - 1), high + 1)


def as_lists(**columns: Any) -> dict[str, Any]:
    """Columns of a Bokeh data source as arrays that own their memory."""
    return {key: np.array(value) for key, value in columns.items()}
