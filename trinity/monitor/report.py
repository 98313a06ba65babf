"""The page as one file: for a letter, a ticket, a machine without a network."""

from __future__ import annotations

import math
from pathlib import Path

from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.models import Div
from bokeh.resources import INLINE

from trinity.core.errors import DataError
from trinity.monitor.charts import View
from trinity.monitor.heat import load_choices
from trinity.monitor.library import Library
from trinity.monitor.page import Page, head_html
from trinity.monitor.style import sheet
from trinity.monitor.tables import runs_html

REPORT_POINTS = 4000
"""A report cannot be refined, so it holds more than the live page shows at a time."""


def write_report(library: Library, target: Path, names: list[str]) -> None:
    """Write the page of these runs, as they are now, with everything it needs inside.

    Curves zoom and answer to the mouse; they hold the lowest and highest values of up to
    ``REPORT_POINTS`` per run.

    Raises:
        DataError: there is no run, or the file cannot be written.
    """
    if not names:
        raise DataError(f"{library.directory}: no run here to report; is it the right directory?")
    page = Page(library)
    try:
        library.read_all(names)
        page.select(names, names[0])
        page.layers = load_choices(page.shown.get(page.focus))[0]
        last = max(1, page.last_step())
        page.x_range.update(start=0, end=1.01 * last, reset_start=0, reset_end=1.01 * last)
        page.update(View(0, math.inf, True, REPORT_POINTS), None)
        texts = [head_html(library, {}), runs_html(list(library.states.values()), page.colors)]
        root = column(
            [
                *(
                    Div(
                        text=text,
                        stylesheets=[sheet()],
                        disable_math=True,
                        sizing_mode="stretch_width",
                    )
                    for text in texts
                ),
                page.root,
            ],
            sizing_mode="stretch_width",
            styles={"padding": "10px 16px"},
        )
        title = f"trinity: {library.directory.name}"
        target.write_text(file_html(root, INLINE, title), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}") from None
