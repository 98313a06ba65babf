"""Spikes and interventions on the curves: where the run was skipped, rewound, resumed, alarmed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, Legend, LegendItem

from trinity.monitor.charts import LEGEND, Chart, View
from trinity.monitor.history import History

MAX_MARKS = 400
"""Of one kind and run in a view; more than one a pixel or two cannot be told apart."""


class Look(NamedTuple):
    """How a kind of event is drawn."""

    label: str
    color: str
    marker: str
    with_line: bool


LOOKS = {
    "skip": Look("skipped step", "#c4203a", "x", False),
    "page": Look("alarm, page", "#c4203a", "triangle", True),
    "warn": Look("alarm, warn", "#d98200", "triangle", False),
    "rewind": Look("rewind", "#7a1fa2", "inverted_triangle", True),
    "resumed": Look("resumed", "#0b62c4", "diamond", True),
    "gave_up": Look("gave up, hang", "#15181c", "square", True),
    "rejected": Look("checkpoint trouble", "#8a5a00", "square_pin", True),
}
LOOK_OF_EVENT = {
    "skip": "skip",
    "rewind": "rewind",
    "resumed": "resumed",
    "gave_up": "gave_up",
    "hang": "gave_up",
    "replay_mismatch": "gave_up",
    "replica_mismatch": "gave_up",
    "checkpoint_rejected": "rejected",
    "checkpoint_failed": "rejected",
}
"""Clipped steps are not marked: on a healthy run there are thousands."""


class Mark(NamedTuple):
    """One event on the step axis."""

    step: int
    look: str
    text: str


def marks_of(history: History) -> list[Mark]:
    """Marks of a run in the order of their steps.

    Steps that were not applied are marked even where no event tells of them. Marks of abandoned
    steps stay: that is what the rewind was for.
    """
    with history.lock:
        found = [mark for event in list(history.events) if (mark := _mark(event)) is not None]
        told = {mark.step for mark in found if mark.look == "skip"}
        train = history.tables["train"]
        skipped = np.flatnonzero(train.column("accepted") == 0)
        steps, losses = train.column("step")[skipped], train.column("loss")[skipped]
        found += [
            Mark(int(step), "skip", f"not applied; loss {loss:.4g}")
            for step, loss in zip(steps, losses, strict=True)
            if int(step) not in told
        ]
    return sorted(found, key=lambda mark: mark.step)


def _mark(event: dict[str, Any]) -> Mark | None:
    name = str(event.get("event"))
    look = LOOK_OF_EVENT.get(name)
    if name == "alarm":
        look = "page" if event.get("severity") == "page" else "warn"
    return Mark(event["step"], look, str(event.get("text", name))) if look else None


def thin(marks: list[Mark], view: View) -> list[Mark]:
    """The marks in view, one per kind in each of ``MAX_MARKS`` equal pieces of it."""
    seen = [mark for mark in marks if view.start <= mark.step <= view.end]
    if len(seen) <= MAX_MARKS:
        return seen
    first, last = seen[0].step, seen[-1].step
    piece = max(1.0, (last - first + 1) / MAX_MARKS)
    return list({(int((m.step - first) / piece), m.look): m for m in reversed(seen)}.values())


class Marks:
    """Symbols on a chart's curves, and lines through all charts for what changed the run."""

    def __init__(self, chart: Chart, others: list[Chart], key: str) -> None:
        """Symbols sit on the curves of ``key`` on ``chart``."""
        self._chart, self._key = chart, key
        self._symbols = {
            look: ColumnDataSource(
                {"step": [], "value": [], "name": [], "text": []}, name=f"marks {look}"
            )
            for look in LOOKS
        }
        self._lines = {
            name: ColumnDataSource({"step": []}) for name, look in LOOKS.items() if look.with_line
        }
        self._found: dict[str, list[Mark]] = {}
        self._focus = ""
        self._drawn: Any = None
        self._known: dict[History, tuple[Any, list[Mark]]] = {}
        renderers: list[Any] = []
        self._items: dict[str, LegendItem] = {}
        for name, look in LOOKS.items():
            for plot in [chart.figure, *(other.figure for other in others)]:
                if look.with_line:
                    plot.vspan(
                        x="step",
                        source=self._lines[name],
                        line_color=look.color,
                        line_alpha=0.55,
                        line_width=1.2,
                        line_dash="dashed",
                        level="underlay",
                    )
            symbol: Any = chart.figure.scatter(
                "step",
                "value",
                source=self._symbols[name],
                marker=look.marker,
                size=11,
                line_color=look.color,
                line_width=2.5 if look.marker == "x" else 1,
                fill_color=look.color,
                level="overlay",
            )
            renderers.append(symbol)
            self._items[name] = LegendItem(label=look.label, renderers=[symbol], visible=False)
        legend = Legend(items=list(self._items.values()), orientation="horizontal", **LEGEND)
        chart.figure.add_layout(legend, "above")
        tips = [("", "@name"), ("step", "@step{0,0}"), ("", "@text")]
        chart.figure.add_tools(HoverTool(renderers=renderers, tooltips=tips))

    def find(self, histories: dict[str, History], focus: str, view: View) -> bool:
        """Look for the marks of these runs. True if there are other ones than before."""
        found = {name: thin(self._marks_of(h), view) for name, h in histories.items()}
        is_new = (found, focus) != (self._found, self._focus)
        self._found, self._focus = found, focus
        return is_new

    def draw(self) -> None:
        """Put what was found on the curves as they are now; lines only for the run in focus."""
        columns: dict[str, dict[str, Any]] = {
            look: {"step": [], "value": [], "name": [], "text": []} for look in LOOKS
        }
        for name, marks in self._found.items():
            values = self._chart.value_at(name, self._key, [mark.step for mark in marks])
            for mark, value in zip(marks, values, strict=True):
                if math.isnan(value):
                    continue
                cells = columns[mark.look]
                cells["step"].append(mark.step)
                cells["value"].append(value)
                cells["name"].append(name)
                cells["text"].append(mark.text)
        lines = {
            look: {"step": [m.step for m in self._found.get(self._focus, []) if m.look == look]}
            for look in self._lines
        }
        if (columns, lines) == self._drawn:
            return
        self._drawn = (columns, lines)
        for look, cells in columns.items():
            self._symbols[look].data = dict(cells)
            self._items[look].visible = bool(cells["step"])
        for look, source in self._lines.items():
            source.data = dict[str, Any](lines[look])

    def _marks_of(self, history: History) -> list[Mark]:
        """As :func:`marks_of`, which goes through all lines, only when there are new ones."""
        key = (history.generation, history.tables["train"].num_rows, history.num_events)
        known = self._known.get(history)
        if known is None or known[0] != key:
            known = self._known[history] = (key, marks_of(history))
        return known[1]
