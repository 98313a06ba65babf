"""Experts' load of many steps: as multiples of the fair share, in bands.

Runs on images also record the load of each range of noise levels. To the bands a layer then is as
many layers as there are ranges.
"""

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
RANGE_LOAD, LAYER_RANGE_LOAD = "load_by_sigma", "load_by_sigma_layers"
"""The same of every range of noise levels of every layer."""
BANDS = {LOAD: LAYER_LOAD, RANGE_LOAD: LAYER_RANGE_LOAD}
"""By the name in a line of the record, which is that of the band of all experts too."""
MAX_EXPERT_ROWS = 2048
"""Layers times experts that are still told apart over a whole run."""


def load_ratios(loads: Sequence[Any]) -> NDArray[np.float32] | None:
    """Tokens [steps, layers, experts] over their mean in the layer; None where that is no block.

    1 is the fair share, 0 an expert without a token. Of tokens [steps, layers, ranges, experts] the
    result is [steps, layers x ranges, experts].
    """
    try:
        tokens = np.array(loads, np.float32)
    except (TypeError, ValueError):
        return None
    if tokens.ndim not in (3, 4) or not tokens.size:
        return None
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return tokens / tokens.mean(axis=2, keepdims=True)


def load_bands(rows: Sequence[dict[str, Any]], bands: dict[str, Band]) -> tuple[int, int] | None:
    """Add the loads of train lines to their bands; (layers, experts), or None without any."""
    shapes = {name: _add(rows, bands, name) for name in BANDS}
    return shapes[LOAD]


def _add(
    rows: Sequence[dict[str, Any]], bands: dict[str, Band], name: str
) -> tuple[int, int] | None:
    held = [row for row in rows if isinstance(row.get(name), list)]
    ratios = load_ratios([row[name] for row in held]) if held else None
    if ratios is None:
        return None
    if name == RANGE_LOAD:
        ratios = np.nan_to_num(ratios, nan=1.0)  # a step without such a noise level says nothing
    steps = np.array([row["step"] for row in held], np.int64)
    num_steps, num_layers, num_experts = ratios.shape
    of_layers = BANDS[name]
    if of_layers not in bands:
        bands[of_layers] = Band(num_layers)
    bands[of_layers].add(steps, ratios.max(axis=2), ratios.min(axis=2))
    if num_layers * num_experts <= MAX_EXPERT_ROWS:
        if name not in bands:
            bands[name] = Band(num_layers * num_experts)
        bands[name].add(steps, ratios.reshape(num_steps, -1))
    return num_layers, num_experts
