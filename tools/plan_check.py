"""Hold the cost model of ``trinity plan`` against published training runs.

    python -m tools.plan_check            # the table
    python -m tools.plan_check --parts    # and where the model thinks the time goes
    python -m tools.plan_check --save     # and keep the numbers

Every error is printed, whatever it is. The facts and what was assumed stand in
trinity/plan/published.toml.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trinity.plan.published import PublishedRun, published_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results/plan_check.json"


def main() -> None:
    """Print predicted beside published, whatever the errors are."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", action="store_true", help="microseconds per token by cause")
    parser.add_argument("--save", action="store_true", help=f"keep them in {RESULTS.name}")
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
    if arguments.save:
        records = [_record(run) for run in runs]
        RESULTS.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    errors = [run.error for run in runs]
    console.print(
        f"{len(runs)} runs: mean error {statistics.mean(errors):+.0%}, mean size of the error "
        f"{statistics.mean(abs(e) for e in errors):.0%}, median size "
        f"{statistics.median(abs(e) for e in errors):.0%}, "
        f"within 20 %: {sum(abs(e) <= 0.2 for e in errors)}, "
        f"largest share of the bound {max(run.share_of_bound for run in runs):.2f}"
    )


def _record(run: PublishedRun) -> dict[str, object]:
    return {
        "name": run.name,
        "gpus": f"{run.num_gpus} {run.gpu}",
        "published": run.tokens_per_s,
        "predicted": round(run.cost.tokens_per_s, 1),
        "bound": round(run.cost.bound_tokens_per_s, 1),
        "error": round(run.error, 3),
        "assumed": run.assumed,
        "source": run.source,
    }


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
