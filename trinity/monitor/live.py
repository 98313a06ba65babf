"""One open browser tab: its controls, and what happens every second."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CheckboxGroup,
    ColumnDataSource,
    DataTable,
    Div,
    HTMLTemplateFormatter,
    NumberFormatter,
    RadioButtonGroup,
    Select,
    TableColumn,
)

from trinity.monitor.catalog import RunState
from trinity.monitor.charts import View
from trinity.monitor.heat import load_choices
from trinity.monitor.library import Library
from trinity.monitor.page import Page, head_html
from trinity.monitor.style import PAGE_POINTS, sheet

TICK_MS = 1000
ZOOM_MS = 150
WINDOWS = {"whole run": math.inf, "last 10,000": 10_000, "last 1,000": 1000, "last 200": 200}
MAX_SELECTED_AT_FIRST = 4
MIN_POINTS, ALL_POINTS = 400, 8000
"""Of one curve, and of all runs on a figure: many runs are sampled more coarsely, by extremes."""
STATE_CELL = """<span style="font-weight:650;color:<%-
 {running:'#0a6b42', silent:'#c4203a', 'gave up':'#c4203a'}[state] || '#15181c' %>"><%- value %>
</span>"""
RUN_CELL = """<span style="display:inline-block;width:10px;height:10px;border-radius:5px;
margin-right:6px;background:<%- color %>"></span><%- value %>"""


class Session:
    """State of one page in a browser."""

    def __init__(self, library: Library, document: Document, wanted: list[str]) -> None:
        """``wanted``: runs to select first, by name; by default those that are running."""
        self.library = library
        self.page = Page(library)
        self._document = document
        self._zoomed: tuple[float, float] | None = None
        self._ours: tuple[float, float] = (0.0, 1.0)
        self._is_waiting = False
        self._names: list[str] = []
        self._shape: tuple[Any, ...] = ()
        self._make_controls()
        self._list_runs()
        first = self._select_first(wanted)
        self.page.load_controls.children = [self._layers, self._mean]
        self.root = column(
            [
                self._head,
                self._table,
                self._controls,
                self.page.root,
            ],
            sizing_mode="stretch_width",
            styles={"padding": "10px 16px", "max-width": "1900px"},
        )
        self.page.select(self._selection(), first)
        self._focus.options, self._focus.value = list[Any](self.page.selected), self.page.focus
        self.tick()
        for end in ("start", "end"):
            _on(self.page.x_range, end, self._zoom_changed)
        document.add_periodic_callback(self.tick, TICK_MS)

    def tick(self) -> None:
        """Show what has been written since."""
        self._list_runs()
        self.page.select(self._selection(), self._focus.value)
        options = list[Any](self.page.selected)
        if self._focus.options != options:
            self._focus.options = options
        if self._focus.value != self.page.focus:
            self._focus.value = self.page.focus
        history = self.page.shown.get(self.page.focus)
        choices = load_choices(history)
        labels: list[Any] = [(c, f"layer {c}" if c[:1].isdigit() else c) for c in choices]
        if self._layers.options != labels:
            self._layers.options = labels
            self._layers.value = choices[0]
        progress = {name: h.progress for name, h in self.page.shown.items()}
        head = head_html(self.library, progress)
        if self._head.text != head:
            self._head.text = head
        self._draw()

    def _draw(self) -> None:
        self._is_waiting = False
        shape = (self.page.selected, self.page.focus, self.page.tabs.active)
        if shape == self._shape:
            self._draw_now()
            return
        self._shape = shape
        # Otherwise each new curve makes Bokeh go through all models of the page.
        with self._document.models.freeze():
            self._draw_now()

    def _draw_now(self) -> None:
        last = max(1, self.page.last_step())
        runs = max(1, len(self.page.selected))
        points = max(MIN_POINTS, min(PAGE_POINTS, ALL_POINTS // runs))
        span = list(WINDOWS.values())[self._window.active or 0]
        if self._zoomed is None:
            start = max(0.0, last - span)
            margin = 0.01 * (last - start)
            self._ours = (start - margin * (start > 0), last + margin)
            self.page.x_range.update(
                start=self._ours[0],
                end=self._ours[1],
                reset_start=self._ours[0],
                reset_end=self._ours[1],
            )
            quantum = 1 if span == math.inf else span / 100
            view = View(start // quantum * quantum, math.inf, self._is_old_shown(), points)
        else:
            view = View(*self._zoomed, self._is_old_shown(), points)
        self.page.layers = str(self._layers.value)
        self.page.mean = bool(self._mean.active)
        self.page.update(view, int(self.page.tabs.active))

    def _zoom_changed(self) -> None:
        start, end = self.page.x_range.start, self.page.x_range.end
        if not isinstance(start, int | float) or not isinstance(end, int | float):
            return
        now = (float(start), float(end))
        width = max(1e-9, self._ours[1] - self._ours[0])
        moved = max(abs(a - b) for a, b in zip(now, self._ours, strict=True))
        self._zoomed = now if moved > 1e-6 * width else None
        self._soon()

    def _soon(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self._document.add_timeout_callback(self._draw, ZOOM_MS)

    def _make_controls(self) -> None:
        self._head = Div(stylesheets=[sheet()], disable_math=True, sizing_mode="stretch_width")
        self._source = ColumnDataSource({key: [] for key in _cells([], {})}, name="runs")
        self._window = RadioButtonGroup(labels=list(WINDOWS), active=0)
        self._old = CheckboxGroup(labels=["steps that a rewind abandoned"], active=[])
        self._focus = Select(title="", options=[], value="", width=260)
        self._layers = Select(title="", options=[], value="", width=260)
        self._mean = CheckboxGroup(labels=["mean of each bin, not its extreme"], active=[])
        self._table = DataTable(
            source=self._source,
            columns=_columns(),
            selectable="checkbox",
            index_position=None,
            row_height=26,
            height=110,
            sizing_mode="stretch_width",
        )
        caption = partial(Div, stylesheets=[sheet()], styles={"padding-top": "5px"})
        follow = Button(label="reset zoom", width=90)
        follow.on_click(self._follow)
        self._controls = row(
            [
                caption(text="<b>Steps</b>"),
                self._window,
                follow,
                caption(text="<b>Details of</b>"),
                self._focus,
                self._old,
            ],
            sizing_mode="stretch_width",
            spacing=10,
        )
        _on(self._window, "active", self._follow)
        for widget, name in ((self._old, "active"), (self._mean, "active")):
            _on(widget, name, self._soon)
        for widget in (self._focus, self._layers):
            _on(widget, "value", self._soon)
        _on(self._source.selected, "indices", self._soon_all)
        _on(self.page.tabs, "active", self._soon)

    def _soon_all(self) -> None:
        self._document.add_next_tick_callback(self.tick)

    def _follow(self) -> None:
        self._zoomed = None
        self._soon()

    def _is_old_shown(self) -> bool:
        return bool(self._old.active)

    def _list_runs(self) -> None:
        states = list(self.library.states.values())
        names = [state.name for state in states]
        kept = self._selection()
        # A run that is gone while it is selected stays in the list: what was read is still shown.
        for name in kept:
            if name not in names:
                old = self.page.shown[name]
                states.append(RunState(name, old.metrics.parent, "gone", 0.0))
        self.page.select(kept, self.page.focus)
        cells = _cells(states, self.page.colors)
        if dict(self._source.data) != cells:
            self._names = [state.name for state in states]
            self._source.data = cells
            self._table.height = 32 + 26 * min(7, max(2, len(states)))
            indices = [at for at, name in enumerate(self._names) if name in kept]
            if self._source.selected.indices != indices:
                self._source.selected.indices = indices

    def _selection(self) -> list[str]:
        indices = sorted(self._source.selected.indices)
        return [self._names[at] for at in indices if at < len(self._names)]

    def _select_first(self, wanted: list[str]) -> str:
        """Select runs; returns the one to show in detail, a running one if there is any."""
        states = self.library.states
        chosen = [name for name in wanted if name in states]
        if not chosen:
            running = [name for name, state in states.items() if state.state == "running"]
            latest = sorted(states.values(), key=lambda state: state.silent_s)[:1]
            chosen = running[:MAX_SELECTED_AT_FIRST] or [state.name for state in latest]
        self._source.selected.indices = [
            at for at, name in enumerate(self._names) if name in chosen
        ]
        going = [name for name in chosen if states[name].state == "running"]
        return next(iter(going or chosen), "")


def _on(model: Any, name: str, act: Callable[[], None]) -> None:
    def changed(attr: str, old: Any, new: Any) -> None:
        act()

    model.on_change(name, changed)


def _columns() -> list[TableColumn]:
    integer = NumberFormatter(format="0,0", text_align="right", nan_format="—")
    decimal = NumberFormatter(format="0.0000", text_align="right", nan_format="—")
    return [
        TableColumn(
            field="run", title="run", width=420, formatter=HTMLTemplateFormatter(template=RUN_CELL)
        ),
        TableColumn(
            field="words",
            title="state",
            width=160,
            formatter=HTMLTemplateFormatter(template=STATE_CELL),
        ),
        TableColumn(field="step", title="step", width=120, formatter=integer),
        TableColumn(field="loss", title="loss", width=140, formatter=decimal),
        TableColumn(field="speed", title="tokens/s", width=140, formatter=integer),
    ]


def _cells(states: list[RunState], colors: Any) -> dict[str, Any]:
    return {
        "run": [state.name for state in states],
        "color": [colors.get(state.name, "#606060") for state in states],
        "state": [state.state for state in states],
        "words": [state.words for state in states],
        "step": [state.step for state in states],
        "loss": [state.loss for state in states],
        "speed": [state.tokens_per_s for state in states],
    }
