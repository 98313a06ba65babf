"""Curves over steps: several runs, or several numbers of one run, on one figure."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    Range1d,
)
from bokeh.models import Line as LineGlyph

from trinity.monitor.columns import Table
from trinity.monitor.history import History
from trinity.monitor.sampling import bucket_means, pick, window
from trinity.monitor.style import ABANDONED, PAGE_POINTS, new_figure

MEAN_BUCKETS = 300
ROWS_PER_BUCKET = 20
MIN_ROWS_FOR_MEAN = 100
PIXELS = 800
PATIENCE_S = 10.0
"""New points of less than a pixel's width are sent after so long at the latest."""
TOOLTIPS = [
    ("", "$name"),
    ("step", "@step{0,0}"),
    ("value", "@value{0,0.[00000]}"),
    ("next row", "@next_row{0,0}"),
]
LEGEND: dict[str, Any] = {
    "border_line_color": None,
    "label_text_font_size": "12px",
    "padding": 0,
    "spacing": 2,
    "glyph_width": 14,
}


class Line(NamedTuple):
    """What a curve shows."""

    name: str
    """Of the run."""
    history: History
    kind: str
    key: str
    color: str
    label: str = ""
    """In the legend of a figure that has one."""


class View(NamedTuple):
    """The part of the step axis that is seen, and what of it."""

    start: float
    end: float
    with_abandoned: bool = False
    points: int = PAGE_POINTS


class Chart:
    """A figure whose curves are refined to what is in view.

    Where there are more steps than pixels, a thin line goes through the lowest and highest values
    and a strong one through the mean.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        x_range: Range1d,
        *,
        height: int = 200,
        log: bool = False,
        legend: bool = False,
    ) -> None:
        """``legend`` names the curves beside the figure; runs are named by the list of runs."""
        self.figure = new_figure(
            title, unit, x_range, height=height, y_axis_type="log" if log else "linear"
        )
        self._curves: dict[tuple[str, str], _Curve] = {}
        self._hover = HoverTool(renderers=[], mode="mouse", tooltips=TOOLTIPS)
        self._log = log
        self._legend = Legend(**LEGEND) if legend else None
        if self._legend is not None:
            self.figure.add_layout(self._legend, "right")
        self.figure.add_tools(self._hover)

    def update(self, lines: Sequence[Line], view: View, *, at_once: bool = True) -> None:
        """Show these lines and no others.

        Those that have not changed are left alone; without ``at_once``, those also whose new
        points would move the picture by less than a pixel.
        """
        wanted = {(line.name, line.key): line for line in lines}
        gone = [key for key in self._curves if key not in wanted]
        for key in gone:
            self._curves.pop(key).remove(self.figure)
        added = [key for key in wanted if key not in self._curves]
        for key in added:
            self._curves[key] = _Curve(self.figure, wanted[key])
        for key, line in wanted.items():
            self._curves[key].update(line, view, positive=self._log, at_once=at_once)
        for key in added:
            self._curves[key].attach()
        if added or gone:
            self._hover.renderers = [curve.points for curve in self._curves.values()]
            if self._legend is not None:
                self._legend.items = [
                    LegendItem(label=wanted[key].label, renderers=[self._curves[key].points])
                    for key in wanted
                ]

    def value_at(self, name: str, key: str, steps: Sequence[float]) -> list[float]:
        """Where marks of these steps sit: on the curve, or beside it where it has a gap."""
        curve = self._curves.get((name, key))
        return curve.value_at(steps) if curve else [math.nan] * len(steps)


class _Curve:
    """One run's line: points that were measured, their mean, and what a rewind abandoned."""

    def __init__(self, plot: Any, line: Line) -> None:
        name = line.label or line.name
        self._points = ColumnDataSource(
            {"step": [], "value": [], "next_row": []}, name=f"points {line.key} {line.name}"
        )
        self._mean = ColumnDataSource({"step": [], "value": []})
        self._old = ColumnDataSource(
            {"step": [], "value": []}, name=f"abandoned {line.key} {line.name}"
        )
        self._plot = plot
        self._old_line: Any = None  # made when there is something to show
        self.points = _line(self._points, line.color, 1.2, name)
        self.mean = _line(self._mean, line.color, 2)
        self._line = line
        self._seen: tuple[Any, ...] = ()
        self._num_rows = self._num_shown = 0
        self._sampled_at = 0.0

    def attach(self) -> None:
        """Put the curve on the figure, filled: while a document is frozen, what is added to it
        is sent at once, and what changes in it later is not."""
        self._plot.renderers.extend([self.points, self.mean])

    def remove(self, plot: Any) -> None:
        """Take the curve off the figure."""
        for renderer in (self._old_line, self.points, self.mean):
            if renderer is not None:
                plot.renderers.remove(renderer)

    def update(self, line: Line, view: View, *, positive: bool, at_once: bool) -> None:
        """Sample again if the run has grown or the view has moved."""
        self._line = line
        with line.history.lock:
            table = line.history.tables[line.kind]
            seen = (line.history.generation, table.abandoned(), view)
            grown = table.num_rows - self._num_rows
            is_waiting = time.monotonic() - self._sampled_at < PATIENCE_S and not at_once
            pixel = self._num_shown // PIXELS if is_waiting else 0
            if seen == self._seen and grown <= pixel:
                return
            self._seen, self._num_rows = seen, table.num_rows
            self._sampled_at = time.monotonic()
            self._sample(table, view, positive)

    def _sample(self, table: Table, view: View, positive: bool) -> None:
        steps = table.live_column("step")
        part = window(steps, view.start, view.end)
        x, y = steps[part], table.live_column(self._line.key)[part]
        rows = table.live_column("next_row")[part]
        if positive:
            y = np.where(y > 0, y, np.nan)
        at = pick(x, y, view.points)
        self._points.data = {
            "step": np.array(x[at]),
            "value": np.array(y[at]),
            "next_row": np.array(rows[at]),
        }
        self._num_shown = len(y)
        with_mean = len(y) >= MIN_ROWS_FOR_MEAN
        buckets = min(MEAN_BUCKETS, max(1, len(y) // ROWS_PER_BUCKET))
        mean = bucket_means(x, y, buckets) if with_mean else (x[:0], y[:0])
        self._mean.data = {"step": np.array(mean[0]), "value": np.array(mean[1])}
        self.points.glyph.line_alpha = 0.45 if with_mean else 1.0
        old = _abandoned(table, self._line.key, view)
        if self._old_line is not None or len(old["step"]):
            self._old.data = old
        if self._old_line is None and len(old["step"]):
            self._old_line = _line(self._old, ABANDONED, 1.5)
            self._old_line.glyph.line_dash = "dotted"
            self._plot.renderers.append(self._old_line)

    def value_at(self, steps: Sequence[float]) -> list[float]:
        """The values at these steps; of the step before where one is missing or not finite."""
        with self._line.history.lock:
            table = self._line.history.tables[self._line.kind]
            x, y = table.live_column("step"), table.live_column(self._line.key)
            found = []
            for step in steps:
                at = int(np.searchsorted(x, step, "right")) - 1
                while at > 0 and not np.isfinite(y[at]):
                    at -= 1
                found.append(float(y[at]) if at >= 0 else math.nan)
        return found


def _line(source: ColumnDataSource, color: str, width: float, name: str | None = None) -> Any:
    # Not plot.line, which makes three more glyphs for selections: with many runs they take seconds.
    glyph = LineGlyph(x="step", y="value", line_color=color, line_width=width)
    return GlyphRenderer(
        data_source=source,
        glyph=glyph,
        nonselection_glyph=None,
        hover_glyph=None,
        muted_glyph=None,
        name=name,
    )


def _abandoned(table: Table, key: str, view: View) -> dict[str, Any]:
    """Points of abandoned lines, a gap after each piece."""
    steps, values = [], []
    for start, end in table.abandoned() if view.with_abandoned else []:
        x, y = table.column("step")[start:end], table.column(key)[start:end]
        part = window(x, view.start, view.end)
        at = pick(x[part], y[part], view.points // 4)
        steps += [*x[part][at], math.nan]
        values += [*y[part][at], math.nan]
    return {"step": np.array(steps), "value": np.array(values)}
