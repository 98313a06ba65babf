"""Tables and the plot of :mod:`tools.ablation`, from what it saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markdown import Markdown

from tools.ablation_rows import BUILD_UP, RATIO, TABLES, TUNED, Row
from tools.ledger import ROOT

DOCUMENT = ROOT / "docs/ablation.md"
FILE_COLUMNS = 150
"""Width of what goes into a file or a pipe."""
Saved = dict[str, Any]
Lines = list[str]


class Mean(NamedTuple):
    """Of several seeds."""

    value: float
    standard_error: float
    """nan of one seed."""
    values: tuple[float, ...]

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.3f}"
        return f"{self.value:.3f}{error}"

    def signed(self) -> str:
        """As a difference."""
        return ("+" if self.value >= 0 else "−") + str(self._replace(value=abs(self.value)))


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and standard error, that is the sample deviation over the root of the number."""
    known = tuple(values)
    mean = sum(known) / len(known)
    if len(known) == 1:
        return Mean(mean, math.nan, known)
    variance = sum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return Mean(mean, math.sqrt(variance / len(known)), known)


def losses_by_seed(saved: Saved, table: str, row: str) -> dict[int, float]:
    """Held-out losses of a row at the chosen learning rate; runs that diverged are left out."""
    factor = saved["common"]["lr_factor"]
    return {
        run["seed"]: run["held_out"]
        for run in saved["runs"].values()
        if (run["table"], run["row"], run["lr_factor"]) == (table, row, factor)
        and run["held_out"] is not None
    }


def difference(saved: Saved, table: str, row: Row) -> Mean | None:
    """Loss of a row minus that of the row it changes, over the seeds that both have.

    Both saw the same documents in the same order under one seed, so this is less noisy than the
    difference of the means.
    """
    ours, theirs = (losses_by_seed(saved, table, key) for key in (row.key, row.versus))
    both = sorted(ours.keys() & theirs.keys())
    return mean_of(ours[seed] - theirs[seed] for seed in both) if both else None


def rows_table(saved: Saved, table: str) -> Lines:
    """The build-up or the ratio table in Markdown."""
    paper = " paper |" if table == BUILD_UP else ""
    heading = (
        "| row | parameters | dense width | seeds | held-out loss | against | change |" + paper
    )
    lines = [heading, "| --- " * (heading.count("|") - 1) + "|"]
    titles = {row.key: number for number, row in enumerate(TABLES[table], start=1)}
    for row in TABLES[table]:
        losses = losses_by_seed(saved, table, row.key)
        if not losses:
            continue
        run = _a_run(saved, table, row.key)
        change = difference(saved, table, row)
        cells = [
            f"{titles[row.key]}. {row.title}",
            f"{run['parameters']:,}",
            f"{run['intermediate_size']}",
            f"{len(losses)}",
            f"{mean_of(losses.values())}",
            f"{titles[row.versus]}" if change else "",
            change.signed() if change else "",
        ]
        cells += [f"{row.paper:.2f}" if row.paper else ""] if table == BUILD_UP else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _a_run(saved: Saved, table: str, row: str) -> Saved:
    return next(r for r in saved["runs"].values() if (r["table"], r["row"]) == (table, row))


def rates_table(saved: Saved) -> Lines:
    """Held-out loss on the first seed by learning rate, one row per family."""
    runs = [run for run in saved["runs"].values() if run["table"] == BUILD_UP and run["seed"] == 1]
    factors = sorted({run["lr_factor"] for run in runs})
    common = saved["common"]
    heads = [f"{common['muon_lr'] * f:g} / {common['adamw_lr'] * f:g}" for f in factors]
    lines = [
        "| Muon / AdamW learning rate | " + " | ".join(heads) + " |",
        "| --- " * (len(factors) + 1) + "|",
    ]
    for row in (row for row in TABLES[BUILD_UP] if row.key in TUNED):
        found = {run["lr_factor"]: run["held_out"] for run in runs if run["row"] == row.key}
        if not found:
            continue
        best = min((loss for loss in found.values() if loss is not None), default=None)
        cells = [_loss_cell(found.get(f, math.nan), best) for f in factors]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return lines


def _loss_cell(loss: float | None, best: float | None) -> str:
    if loss is None:
        return "diverged"
    if math.isnan(loss):
        return ""
    return f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"


def setting(saved: Saved) -> Lines:
    """What all runs have in common, and what they cost, as one paragraph."""
    common, runs = saved["common"], saved["runs"].values()
    factor = common["lr_factor"]
    tokens = common["num_steps"] * common["tokens_per_step"]
    cpu_s, wall_s = (sum(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
    return [
        f"{len(runs)} runs of {common['num_steps']} steps of {common['tokens_per_step']:,} tokens "
        f"({tokens:,} in all) in rows of {common['sequence_length']}, {common['precision']}; "
        f"Muon {common['muon_lr'] * factor:g}, AdamW {common['adamw_lr'] * factor:g}; torch "
        f"{common['torch']}. {cpu_s / 3600:.1f} hours of one CPU core; "
        f"the runs lasted {wall_s / 3600:.1f} hours, two at a time beside other work."
    ]


def show(saved: Saved) -> None:
    """Print every table that has a row."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_COLUMNS)
    for table in TABLES:
        lines = rows_table(saved, table)
        if len(lines) > 2:
            console.print(Markdown("\n".join(lines)))
    console.print(Markdown("\n".join([*rates_table(saved), "", *setting(saved)])))


def write_document(saved: Saved, path: Path) -> None:
    """Replace the marked sections of the document."""
    sections = {
        "setting": setting(saved),
        "rates": rates_table(saved),
        BUILD_UP: rows_table(saved, BUILD_UP),
        RATIO: rows_table(saved, RATIO),
    }
    text = path.read_text(encoding="utf-8")
    for name, lines in sections.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + "\n".join([begin, *lines, end]) + after
    path.write_text(text, encoding="utf-8")


def plot(saved: Saved, path: Path) -> None:
    """Both tables as one picture: dots are seeds, bars are means with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5.5), width_ratios=(3, 2), layout="constrained"
    )
    _plot_build_up(left, saved)
    _plot_ratio(right, saved)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _plot_build_up(axes: Any, saved: Saved) -> None:
    rows = [row for row in TABLES[BUILD_UP] if losses_by_seed(saved, BUILD_UP, row.key)]
    for position, row in enumerate(rows):
        mean = mean_of(losses_by_seed(saved, BUILD_UP, row.key).values())
        axes.errorbar(mean.value, position, xerr=_bar(mean), fmt="o", color="C0", capsize=4)
        axes.plot(mean.values, [position] * len(mean.values), ".", color="C1", markersize=4)
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("held-out loss, nats per token")
    axes.set_title("build-up, dense")


def _plot_ratio(axes: Any, saved: Saved) -> None:
    for color, kind, name in (("C0", "mamba2s", "Mamba-2S"), ("C3", "2mamba", "2Mamba")):
        rows = [row for row in TABLES[RATIO] if row.key == "attention" or f"{kind}-" in row.key]
        found = {
            row.linear_share: mean_of(losses.values())
            for row in rows
            if (losses := losses_by_seed(saved, RATIO, row.key))
        }
        for share, mean in found.items():
            axes.plot([share] * len(mean.values), mean.values, ".", color=color, markersize=4)
        values = [mean.value for mean in found.values()]
        errors = [_bar(mean) for mean in found.values()]
        axes.errorbar(list(found), values, yerr=errors, color=color, capsize=4, label=name)
    axes.set_xticks([0, 0.25, 0.5, 0.75])
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("share of linear-time layers")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title("hybrids, mixture of experts")
    axes.legend()


def _bar(mean: Mean) -> float:
    return 0.0 if math.isnan(mean.standard_error) else mean.standard_error
