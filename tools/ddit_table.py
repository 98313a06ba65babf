"""The results of :mod:`tools.ddit_flux` as a table and as a curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    ("ms/image", "cpu_ms", "{:.0f}"),
    ("tokens", "token_share", "{:.1%}"),
    ("GFLOP", "gflops", "{:.1f}"),
    ("FD", "frechet_distance", "{:.2f}"),
    ("SWD", "sliced_wasserstein", "{:.4f}"),
    ("class", "class_accuracy", "{:.1%}"),
    ("PSNR", "psnr", "{:.1f}"),
    ("SSIM", "ssim", "{:.3f}"),
)


def show_table(rows: list[dict[str, Any]], console: Console, *, title: str) -> None:
    """Print all methods; speed is against the first row."""
    table = Table(title=f"{title}, one CPU thread")
    table.add_column("method")
    for heading in ("speed", *(heading for heading, _, _ in COLUMNS)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for _, key, form in COLUMNS]
        table.add_row(row["name"], f"{rows[0]['cpu_ms'] / row['cpu_ms']:.2f}x", *cells)
    console.print(table)


def save_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against speed, one line for each kind of method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.4))
    panels = (
        ("frechet_distance", "Fréchet distance to real digits (lower is better)"),
        ("psnr", "PSNR to all fine, dB (higher is better)"),
    )
    kinds = dict.fromkeys(row["kind"] for row in rows)
    palette = pyplot.get_cmap("tab20")  # strong ones first, then their pale brothers
    numbers = (*range(0, 20, 2), *range(1, 20, 2))
    colours = {kind: palette(number) for kind, number in zip(kinds, numbers, strict=False)}
    for axis, (key, title) in zip(axes, panels, strict=True):
        for kind, colour in colours.items():
            points = sorted(
                (rows[0]["cpu_ms"] / row["cpu_ms"], row[key])
                for row in rows
                if row["kind"] == kind and key in row
            )
            if points:
                line = zip(*points, strict=True)
                axis.plot(*line, "o-", label=kind, markersize=4, color=colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("times as fast as all fine")
    axes[0].axhline(1.03 * rows[0]["frechet_distance"], color="gray", linestyle=":", label="+ 3 %")
    axes[0].set_yscale("log")  # pooled latents are far away
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
