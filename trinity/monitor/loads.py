"""Experts' load of many steps: as multiples of the fair share, in bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trinity.monitor.bands import Band

LOAD = "load"
"""Band of all experts of all layers, layer by layer; missing where they are too many."""
LAYER_LOAD = "load_layers"
"""Band with a number per layer: highest = its hottest expert, lowest = its coldest."""
MAX_EXPERT_ROWS = 2048
"""Layers times experts that are still told apart over a whole run."""


def load_ratios(loads: Sequence[Any]) -> NDArray[np.float32] | None:
    """Tokens [steps, layers, experts] over their mean in the layer; None where that is no block.

    1 is the fair share, 0 an expert without a token.
    """
    try:
        tokens = np.array(loads, np.float32)
    except (TypeError, ValueError):
        return None
    if tokens.ndim != 3 or not tokens.size:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return tokens / tokens.mean(axis=2, keepdims=True)


def load_bands(rows: Sequence[dict[str, Any]], bands: dict[str, Band]) -> tuple[int, int] | None:
    """Add the loads of train lines to their bands; (layers, experts), or None without any."""
    held = [row for row in rows if isinstance(row.get("load"), list)]
    ratios = load_ratios([row["load"] for row in held]) if held else None
    if ratios is None:
        return None
    steps = np.array([row["step"] for row in held], np.int64)
    num_steps, num_layers, num_experts = ratios.shape
    if LAYER_LOAD not in bands:
        bands[LAYER_LOAD] = Band(num_layers)
    bands[LAYER_LOAD].add(steps, ratios.max(axis=2), ratios.min(axis=2))
    if num_layers * num_experts <= MAX_EXPERT_ROWS:
        if LOAD not in bands:
            bands[LOAD] = Band(num_layers * num_experts)
        bands[LOAD].add(steps, ratios.reshape(num_steps, -1))
    return num_layers, num_experts
