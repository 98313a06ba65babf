"""How the page looks: colours, fonts, figures. Nothing of it is fetched from anywhere."""

from __future__ import annotations

from typing import Any

from bokeh.models import InlineStyleSheet, NumeralTickFormatter, Range1d, Title
from bokeh.palettes import RdBu11, interp_palette
from bokeh.plotting import figure

INK, FAINT, LINE, PAPER = "#15181c", "#59636e", "#d0d7de", "#ffffff"
FONT = "system-ui, 'DejaVu Sans', 'Liberation Sans', sans-serif"
RUN_COLORS = (
    *("#0b62c4", "#d1590b", "#0a7d4b", "#a3238e", "#8a6100", "#00808f", "#c4203a", "#5b4bc9"),
    *("#4f7a00", "#8b4a2b", "#3f5f7f", "#b0006a", "#1f8a70", "#7a3e9d", "#a05a00", "#2f4fa8"),
    *("#6b6b00", "#8f2d2d", "#007a9e", "#606060"),
)
"""Told apart on white, at least 4:1 of contrast; repeated beyond twenty runs."""
ABANDONED = "#9aa4ae"
DIVERGING = interp_palette(RdBu11, 255)
"""From blue, below the centre, over white to red."""
HOTTEST = "#3d0010"
MAX_UNIT_LETTERS = 14
"""A longer unit fits along the axis of a low figure in small letters only."""
PAGE_POINTS = 1600
"""A curve's points per view: about one lowest and one highest for each pixel of its width."""

CSS = f"""
:host, body {{ font-family: {FONT}; font-size: 13px; color: {INK}; }}
h1 {{ font-size: 19px; margin: 0; font-weight: 650; }}
h2 {{ font-size: 14px; margin: 0 0 6px 0; font-weight: 650; }}
.faint {{ color: {FAINT}; }}
.pill {{ border-radius: 9px; padding: 1px 8px; font-weight: 650; font-size: 12px;
  white-space: nowrap; }}
.page {{ background: #c4203a; color: #fff; }}
.warn {{ background: #ffe2a8; color: #4d3300; }}
.good {{ background: #d5f2e0; color: #084c2e; }}
.plain {{ background: #e8ecf0; color: {INK}; }}
.dot {{ display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin-right: 5px; }}
.card {{ border: 1px solid {LINE}; border-left: 5px solid #c98b00; border-radius: 4px;
  padding: 7px 10px; margin: 0 0 7px 0; line-height: 1.4; }}
.card.severe {{ border-left-color: #c4203a; }}
.first {{ margin-top: 3px; }}
table {{ border-collapse: collapse; width: 100%; }}
th {{ text-align: left; font-weight: 650; border-bottom: 2px solid {LINE}; padding: 4px 8px; }}
td {{ border-bottom: 1px solid {LINE}; padding: 4px 8px; vertical-align: top; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }}
"""


def sheet() -> InlineStyleSheet:
    """The style of texts and tables."""
    return InlineStyleSheet(css=CSS)


def run_color(position: int) -> str:
    """Colour of the run at this place of the list."""
    return RUN_COLORS[position % len(RUN_COLORS)]


def new_figure(title: str, unit: str, x_range: Range1d, *, height: int, **more: Any) -> figure:
    """A figure on the common step axis, with a unit on its own axis."""
    plot = figure(
        title=Title(text=title, text_font_size="13px", text_color=INK),
        height=height,
        x_range=x_range,
        tools="xpan,xwheel_zoom,box_zoom,reset,save",
        active_scroll=None,
        active_drag="box_zoom",
        toolbar_location="above",
        toolbar_inner=True,
        sizing_mode="stretch_width",
        min_border_left=74,
        min_border_right=18,
        **more,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.axis_label = "step"
    plot.yaxis.axis_label = "" if unit == "1" else unit
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.axis_line_color = axis.major_tick_line_color = FAINT
    if len(unit) > MAX_UNIT_LETTERS:
        plot.yaxis.axis_label_text_font_size = "10px"
    plot.grid.grid_line_color = "#e6eaee"
    plot.outline_line_color = None
    return plot
