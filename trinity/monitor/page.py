"""The page: what is on it and where. Live pages and reports are made of the same parts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from bokeh.layouts import column, row
from bokeh.models import Div, Range1d, TabPanel, Tabs

from trinity.core.instruments import instruments
from trinity.monitor.charts import Chart, Line, View
from trinity.monitor.heat import ALL_LAYERS, HeatMap, load_picture, rank_picture
from trinity.monitor.history import History
from trinity.monitor.library import Library
from trinity.monitor.marks import Marks
from trinity.monitor.style import run_color, sheet
from trinity.monitor.tables import alarms_html, config_html, journal_html

KINDS_OF_PARAMETERS = ("matrix", "router", "table", "vector")
PART_COLORS = ("#0b62c4", "#d1590b", "#0a7d4b", "#a3238e", "#8a6100", "#00808f", "#606060")
LOSS_UNIT = instruments()["loss"].unit
UNITS = {
    "lr_muon": ("Learning rate of Muon", "1"),
    "max_vio_max": ("MaxVio, worst layer", "1"),
    "step_s": ("Step time", "s"),
    "validation": ("Validation loss", LOSS_UNIT),
    "sigma_information": ("What the noise level tells of the expert, worst layer", "nats"),
    "sigma_max_vio": ("MaxVio, worst layer and noise range", "1"),
}
OF_SOME_RUNS = {name for name, row in instruments().items() if row.runs != "all"}
"""Their figures are shown only where a selected run has them."""
EXPERTS, VALIDATION, LOGITS, SPEED, CONFIG = range(5)
SIDE_PIXELS = 400
HEAT_STEPS = 200
"""A heat map of a long run is drawn again after so many new lines."""


class Page:
    """All figures of a page and what they show of which runs."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.x_range = Range1d(start=0, end=1)
        self.selected: list[str] = []
        self.focus = ""
        self.with_abandoned = False
        self.layers = ALL_LAYERS
        self.mean = False
        self.alarms, self.journal, self.config = (_text() for _ in range(3))
        self._histories: dict[str, History] = {}
        self._colors: dict[str, str] = {}
        self._paths: dict[str, Any] = {}
        self._make_main()
        self._make_tabs()
        # Wide figures above each other, so that a step is at the same place on all of them. The
        # texts beside them are placed by style alone: tabs in a column of a row are laid out by
        # Bokeh again and again without an end.
        width = f"{SIDE_PIXELS}px"
        texts = column(
            [self.alarms, self.journal],
            width=SIDE_PIXELS,
            styles={"position": "absolute", "right": "0", "top": "0", "width": width},
        )
        for div in (self.alarms, self.journal):
            div.styles = {"overflow-wrap": "anywhere", "width": width}
        figures = [chart.figure for chart, _, _ in self._main]
        self.root = column(
            [*figures, self.tabs, texts],
            sizing_mode="stretch_width",
            styles={"position": "relative", "padding-right": f"{SIDE_PIXELS + 18}px"},
        )

    def select(self, names: list[str], focus: str) -> None:
        """Compare these runs; details are those of ``focus``."""
        for position, name in enumerate(self.library.states):
            self._colors.setdefault(name, run_color(position))
        for name in names:
            history = self.library.history(name)
            if history is not None:
                self._histories[name] = history
                self._paths[name] = self.library.states[name].path
        self.selected = [name for name in names if name in self._histories]
        self.focus = focus if focus in self.selected else next(iter(self.selected), "")

    @property
    def colors(self) -> Mapping[str, str]:
        """Colour of each run."""
        return self._colors

    @property
    def shown(self) -> dict[str, History]:
        """Histories of the selected runs."""
        return {name: self._histories[name] for name in self.selected}

    def last_step(self) -> int:
        """The farthest step of the selected runs."""
        return max((h.tables["train"].last_step for h in self.shown.values()), default=0)

    def update(self, view: View, tab: int | None) -> None:
        """Bring the first part and one tab, all for None, to what the runs have written."""
        changed = self._marks.find(self.shown, self.focus, view)
        for chart, kind, key in self._main:
            chart.update(self._lines(kind, key), view, at_once=changed)
        self._marks.draw()
        problems = {
            name: self.library.problems[path.resolve()]
            for name, path in self._paths.items()
            if path.resolve() in self.library.problems
        }
        texts = (
            (self.alarms, alarms_html(self.shown, self.library.states, self.colors, problems)),
            (self.journal, journal_html(self.shown, self.colors)),
        )
        for div, text in texts:
            if div.text != text:
                div.text = text
        for number in range(5) if tab is None else (tab,):
            self._update_tab(number, view)

    def _make_main(self) -> None:
        x = self.x_range
        loss = Chart(*_title("loss"), x, height=330)
        grad = Chart(*_title("grad_norm"), x, height=210, log=True)
        rate = Chart(*UNITS["lr_muon"], x, height=150)
        self._main = [
            (loss, "train", "loss"),
            (grad, "train", "grad_norm"),
            (rate, "train", "lr_muon"),
        ]
        self._marks = Marks(loss, [grad, rate], "loss")
        for chart, _, key in self._main:
            chart.figure.name = key

    def _make_tabs(self) -> None:
        x = self.x_range
        self.load_map = HeatMap("Experts' load", "expert", x, height=360, bar="load / fair share")
        self.load_map.figure.name = "load"
        self.rank_map = HeatMap(
            "Ranks' probe time", "rank", x, height=230, bar="time / median", high=1.5
        )
        self._by_run: dict[int, list[tuple[Chart, str, str]]] = {
            EXPERTS: self._charts(
                *("max_vio_max", "load_entropy", "dead_experts", "bias_norm"),
                *("sigma_information", "sigma_max_vio"),
            ),
            VALIDATION: self._charts("validation"),
            LOGITS: self._charts(
                "attention_logit_max", "router_logit_rms", "logit_max", "router_drift"
            ),
            SPEED: self._charts("tokens_per_s", "step_s", "mfu", "straggler"),
            CONFIG: [],
        }
        self._sources = Chart("Validation loss by source", LOSS_UNIT, x, legend=True)
        self._norms = Chart("Gradient norm by parameters", "1", x, log=True, legend=True)
        self._ratios = Chart("Update over weight", "1", x, log=True, legend=True)
        self.load_controls = row([], sizing_mode="stretch_width")
        rows = {
            number: _pairs([chart.figure for chart, _, _ in charts])
            for number, charts in self._by_run.items()
        }
        parts: dict[str, list[Any]] = {
            "Experts": [self.load_controls, self.load_map.figure, *rows[EXPERTS]],
            "Validation": [*rows[VALIDATION], self._sources.figure],
            "Gradients and logits": [
                *_pairs([self._norms.figure, self._ratios.figure]),
                *rows[LOGITS],
            ],
            "Speed": [*rows[SPEED], self.rank_map.figure],
            "Configuration": [self.config],
        }
        # A tab's figures are sent to the browser when it is opened first.
        self._parts_of_tab = list(parts.values())
        self._panels = [column([], sizing_mode="stretch_width") for _ in parts]
        self.tabs = Tabs(
            tabs=[
                TabPanel(title=title, child=panel)
                for title, panel in zip(parts, self._panels, strict=True)
            ],
            sizing_mode="stretch_width",
            stylesheets=[".bk-tab { font-size: 14px; } .bk-tab.bk-active { font-weight: 650; }"],
        )

    def _charts(self, *names: str) -> list[tuple[Chart, str, str]]:
        made = []
        for name in names:
            kind, key = _where(name)
            made.append((Chart(*_title(name), self.x_range), kind, key))
        return made

    def _update_tab(self, tab: int, view: View) -> None:
        self._fill_tab(tab, view)
        if not self._panels[tab].children:  # last, for the reason given in charts.py
            self._panels[tab].children = self._parts_of_tab[tab]

    def _fill_tab(self, tab: int, view: View) -> None:
        for chart, kind, key in self._by_run[tab]:
            chart.update(self._lines(kind, key), view, at_once=False)
            if key in OF_SOME_RUNS:
                recorded = [history.tables[kind].keys() for history in self.shown.values()]
                chart.figure.visible = any(key in keys for keys in recorded)
        history = self._histories.get(self.focus) if self.focus in self.selected else None
        if tab == CONFIG:
            paths = {name: self._paths[name] for name in self.selected}
            self.config.text = config_html(paths, self.colors)
        if history is None:
            return
        if tab == EXPERTS:
            self._update_load(history, view)
        elif tab == VALIDATION:
            keys = history.tables["validation"].keys()
            sources = [key for key in keys if key not in ("step", "time", "loss")]
            self._sources.update(self._parts("validation", sources, history), view)
        elif tab == LOGITS:
            for chart, prefix in ((self._norms, "grad_norm_"), (self._ratios, "update_ratio_")):
                keys = [prefix + part for part in KINDS_OF_PARAMETERS]
                chart.update(self._parts("instruments", keys, history, prefix), view)
        elif tab == SPEED:
            band = history.bands.get("rank_ms")
            key = (self.focus, history.generation, self.mean, band and band.num_bins)
            self.rank_map.show(key, lambda: rank_picture(band, mean=self.mean) if band else None)

    def _update_load(self, history: History, view: View) -> None:
        rows = history.tables["train"].num_rows
        age = rows if rows < 2 * HEAT_STEPS else rows // HEAT_STEPS
        key = (self.focus, history.generation, age, view, self.layers, self.mean)
        self.load_map.show(key, lambda: load_picture(history, view, self.layers, mean=self.mean))

    def _lines(self, kind: str, key: str) -> list[Line]:
        return [
            Line(name, history, kind, key, self._colors[name])
            for name, history in self.shown.items()
        ]

    def _parts(self, kind: str, keys: list[str], history: History, prefix: str = "") -> list[Line]:
        return [
            Line(
                self.focus,
                history,
                kind,
                key,
                PART_COLORS[position % len(PART_COLORS)],
                key.removeprefix(prefix),
            )
            for position, key in enumerate(keys)
        ]


def head_html(library: Library, progress: Mapping[str, float]) -> str:
    """The top line: which directory, how many runs in which state, what is still being read."""
    states = list(library.states.values())
    counts = {
        word: sum(state.state == word for state in states)
        for word in ("running", "silent", "stopped", "gave up", "finished", "waiting")
    }
    pills = {"running": "good", "silent": "page", "gave up": "page"}
    told = " ".join(
        f'<span class="pill {pills.get(word, "plain")}">{count} {word}</span>'
        for word, count in counts.items()
        if count
    )
    reading = [f"{escape(name)} {share:.0%}" for name, share in progress.items() if share < 0.999]
    behind = f" <span class=faint>reading {', '.join(reading[:4])}</span>" if reading else ""
    where = escape(str(library.directory))
    if not states:
        told = "<span class=faint>No run here yet; the page looks for one every second.</span>"
    return f"<h1>{where} &nbsp; {told}{behind}</h1>"


def _title(name: str) -> tuple[str, str]:
    if name in UNITS:
        return UNITS[name]
    row = instruments()[name]
    return row.title, row.unit


def _where(name: str) -> tuple[str, str]:
    if name == "validation":
        return "validation", "loss"
    row = instruments().get(name)
    return (row.record, row.name) if row and row.record != "clock" else ("train", name)


def _pairs(figures: list[Any]) -> list[Any]:
    return [
        row(figures[at : at + 2], sizing_mode="stretch_width", spacing=14)
        for at in range(0, len(figures), 2)
    ]


def _text() -> Div:
    return Div(stylesheets=[sheet()], disable_math=True, sizing_mode="stretch_width")
