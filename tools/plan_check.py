"""Hold the cost model of ``trinity plan`` against published training runs.

python -m tools.plan_check            # the table
python -m tools.plan_check --parts    # and where the model thinks the time goes
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trinity.plan.published import PublishedRun, published_runs

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print predicted beside published, whatever the errors are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", action="store_true", help="microseconds per token by cause")
    arguments = parser.parse_args()
    runs = published_runs(ROOT)
    console = Console(width=130, highlight=False)
    console.print(_table(runs))
    if arguments.parts:
        for run in runs:
            parts = {
                name: round(run.cost.microseconds_per_token(name), 1)
                for name, seconds in run.cost.parts.items()
                if seconds > 0
            }
            console.print(f"{run.name}, {run.num_gpus} {run.gpu}: {parts}")
    errors = [run.error for run in runs]
    console.print(
        f"{len(runs)} runs: mean error {statistics.mean(errors):+.0%}, mean size of the error "
        f"{statistics.mean(abs(e) for e in errors):.0%}, median size "
        f"{statistics.median(abs(e) for e in errors):.0%}, "
        f"within 20 %: {sum(abs(e) <= 0.2 for e in errors)}, "
        f"largest share of the bound {max(run.share_of_bound for run in runs):.2f}"
    )


def _table(runs: list[PublishedRun]) -> Table:
    table = Table(title="tokens per second and GPU")
    for heading in ("run", "GPUs"):
        table.add_column(heading)
    for heading in ("published", "predicted", "error", "bound", "published / bound"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.num_gpus} {run.gpu}",
            f"{run.tokens_per_s:,.0f}",
            f"{run.cost.tokens_per_s:,.0f}",
            f"{run.error:+.0%}",
            f"{run.cost.bound_tokens_per_s:,.0f}",
            f"{run.share_of_bound:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
