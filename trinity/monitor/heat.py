"""Heat maps over steps: experts' load, ranks' times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    Range1d,
)
from numpy.typing import NDArray

from trinity.monitor.bands import Band
from trinity.monitor.charts import View
from trinity.monitor.history import History
from trinity.monitor.loads import BANDS, LOAD, RANGE_LOAD, load_ratios
from trinity.monitor.style import DIVERGING, HOTTEST, INK, new_figure

MAX_EXACT_STEPS = 400
"""A view of at most so many logged steps is read from the file again, step by step."""
HOTTEST_EXPERT, COLDEST_EXPERT = "hottest expert of each layer", "coldest expert of each layer"
ALL_LAYERS = "all experts of all layers"
BY_NOISE = " by noise level"
"""What other choices end with to show each range of noise levels by itself."""


class Picture(NamedTuple):
    """Rows over steps: values [rows, bins], the first step of the first bin, steps per bin."""

    values: NDArray[np.float32]
    start: float
    bin_steps: float
    labels: dict[float, str]
    """Names on the vertical axis, by row."""


class HeatMap:
    """Values around a fair 1: white is fair, red above, blue below."""

    def __init__(
        self, title: str, unit: str, x_range: Range1d, *, height: int, bar: str, high: float = 2.0
    ) -> None:
        self._rows = Range1d(start=1, end=0)
        self.figure = new_figure(title, unit, x_range, height=height, y_range=self._rows)
        self._source = ColumnDataSource({key: [] for key in ("image", "x", "y", "dw", "dh")})
        colors = LinearColorMapper(
            palette=DIVERGING,
            low=2.0 - high,
            high=high,
            high_color=HOTTEST,
            nan_color="#c9ced4",
        )
        image = self.figure.image(
            "image",
            source=self._source,
            x="x",
            y="y",
            dw="dw",
            dh="dh",
            color_mapper=colors,  # pyright: ignore[reportCallIssue]
        )
        self.figure.add_tools(
            HoverTool(
                renderers=[image],
                tooltips=[("step", "$x{0,0}"), ("row", "$y{0}"), (bar, "@image{0.000}")],
            )
        )
        scale = ColorBar(
            color_mapper=colors,
            title=bar,
            orientation="horizontal",
            width=220,
            height=9,
            margin=0,
            padding=2,
            title_text_font_style="normal",
            title_text_font_size="12px",
            title_text_color=INK,
            ticker=BasicTicker(desired_num_ticks=5),
        )
        self.figure.add_layout(scale, "above")  # at the side it would make the steps narrower
        self.figure.grid.visible = False
        self._shown: Any = None

    def show(self, key: Any, make: Callable[[], Picture | None]) -> None:
        """Draw what ``make`` returns; it is called only if ``key`` is not what is shown."""
        if key == self._shown:
            return
        self._shown = key
        picture = make()
        if picture is None or not picture.values.size:
            self._source.data = {key: [] for key in ("image", "x", "y", "dw", "dh")}
            return
        num_rows, num_bins = picture.values.shape
        self._source.data = {
            "image": [np.ascontiguousarray(picture.values, np.float32)],
            "x": [picture.start],
            "y": [0],
            "dw": [num_bins * picture.bin_steps],
            "dh": [num_rows],
        }
        self._rows.update(start=num_rows, end=0)
        axis = self.figure.yaxis
        axis.ticker = FixedTicker(ticks=list(picture.labels))
        axis.major_label_overrides = dict[Any, Any](picture.labels)


def load_picture(history: History, view: View, layers: str, *, mean: bool) -> Picture | None:
    """Load over fair share of the experts in view.

    Args:
        history: of the run.
        view: the steps; a short stretch is shown step by step, a long one in bins.
        layers: ``ALL_LAYERS``, ``HOTTEST_EXPERT``, ``COLDEST_EXPERT`` or a layer's number; of runs
            on images perhaps with ``BY_NOISE`` behind it.
        mean: of a bin its mean instead of what is farthest from the fair share.
    """
    if history.load_shape is None:
        return None
    num_layers, num_experts = history.load_shape
    name, num_ranges = LOAD, 1
    if layers.endswith(BY_NOISE) and history.num_ranges:
        name, num_ranges = RANGE_LOAD, history.num_ranges
    layers = layers.removesuffix(BY_NOISE)
    exact = _exact(history, view, name)
    with history.lock:
        bands = history.bands
        if exact is not None:
            start, ratios = exact
        elif layers in (HOTTEST_EXPERT, COLDEST_EXPERT) or name not in bands:
            band = bands[BANDS[name]]
            values = band.low() if layers == COLDEST_EXPERT else band.high()
            labels = _layer_labels(num_layers, num_ranges)
            return Picture(values.T, 0, band.bin_steps, labels)
        else:
            band = bands[name]
            values = band.mean() if mean else band.farthest(1.0)
            ratios = values.reshape(len(values), num_layers * num_ranges, num_experts)
            start = 0
        bin_steps = 1.0 if exact is not None else float(band.bin_steps)
    if layers in (HOTTEST_EXPERT, COLDEST_EXPERT):
        edge = ratios.max(axis=2) if layers == HOTTEST_EXPERT else ratios.min(axis=2)
        return Picture(edge.T, start, bin_steps, _layer_labels(num_layers, num_ranges))
    if layers.isdigit() and int(layers) < num_layers:
        first = int(layers) * num_ranges
        own = ratios[:, first : first + num_ranges].reshape(len(ratios), -1)
        labels = {row + 0.5: f"expert {row}" for row in _spread(num_experts, 16)}
        if num_ranges > 1:
            labels = _range_labels(num_ranges, num_experts)
        return Picture(own.T, start, bin_steps, labels)
    flat = ratios.reshape(len(ratios), -1)
    return Picture(flat.T, start, bin_steps, _layer_labels(num_layers, num_ranges * num_experts))


def rank_picture(band: Band, *, mean: bool) -> Picture:
    """Time of each rank over the median of the ranks."""
    values = band.mean() if mean else band.high()
    usual = np.ones((len(values), 1), np.float32)
    filled = np.isfinite(values).any(axis=1)
    usual[filled, 0] = np.nanmedian(band.mean()[filled], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = values / usual
    # Ranks are timed every few steps; a reading holds until the next one.
    latest = np.maximum.accumulate(np.where(filled, np.arange(len(values)), 0))
    ratios = ratios[latest]
    labels = {row + 0.5: f"rank {row}" for row in _spread(band.width, 12)}
    return Picture(ratios.T, 0, band.bin_steps, labels)


def load_choices(history: History | None) -> list[str]:
    """What :func:`load_picture` can show of a run, the best first."""
    if history is None or history.load_shape is None:
        return [ALL_LAYERS]
    whole = [ALL_LAYERS] if LOAD in history.bands else []
    layers = [str(layer) for layer in range(history.load_shape[0])]
    by_noise = [HOTTEST_EXPERT, COLDEST_EXPERT, *layers] if history.num_ranges else []
    plain = [*whole, HOTTEST_EXPERT, COLDEST_EXPERT, *layers]
    return [*plain, *(choice + BY_NOISE for choice in by_noise)]


def _exact(history: History, view: View, name: str) -> tuple[float, NDArray[np.float32]] | None:
    """Loads [steps, layers, experts] of every step in view, if these are few enough to read."""
    with history.lock:
        steps = history.tables["train"].live_column("step")
        low, high = np.searchsorted(steps, view.start), np.searchsorted(steps, view.end, "right")
        if not 0 < high - low <= MAX_EXACT_STEPS:
            return None
        first, last = int(steps[low]), int(steps[high - 1])
    if last - first >= 4 * MAX_EXACT_STEPS:  # logged seldom: bins are as good
        return None
    records = history.records_at((first, last), MAX_EXACT_STEPS)
    held = [record for record in records if isinstance(record.get(name), list)]
    ratios = load_ratios([record[name] for record in held]) if held else None
    if ratios is None:
        return None
    filled = np.full((last - first + 1, *ratios.shape[1:]), np.nan, np.float32)
    filled[[record["step"] - first for record in held]] = ratios
    return first - 0.5, filled


def _layer_labels(num_layers: int, rows: int) -> dict[float, str]:
    return {(i + 0.5) * rows: f"layer {i}" for i in _spread(num_layers, 16)}


def _range_labels(num_ranges: int, rows: int) -> dict[float, str]:
    bounds = [f"{i / num_ranges:.2g}" for i in range(num_ranges + 1)]
    return {(i + 0.5) * rows: f"σ {bounds[i]}–{bounds[i + 1]}" for i in range(num_ranges)}


def _spread(count: int, most: int) -> range:
    return range(0, count, -(-count // most) if count else 1)
