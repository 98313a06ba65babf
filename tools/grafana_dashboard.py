"""Write launch/prometheus/grafana.json from the table of instruments.

    python -m tools.grafana_dashboard            # write it
    python -m tools.grafana_dashboard --check    # only compare; exit status 1 when out of date

Every instrument gets a panel; one that is added to the table appears in the last row until
``ROWS`` gives it a better place.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from tools.alert_rules import ROOT, write_or_check
from trinity.core.instruments import Instrument
from trinity.monitor.serve_metrics import exported_instruments, gauge_name

DASHBOARD = ROOT / "launch/prometheus/grafana.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = '{run=~"$run"}'
PANELS_PER_ROW = 3
WIDTH, HEIGHT = 24 // PANELS_PER_ROW, 8

ROWS = {
    "Loss": ("loss", "loss_*", "overflow", "validation_loss", "batch_het", "num_skipped"),
    "Gradients and updates": ("grad_norm", "grad_score", "grad_norm_*", "update_ratio_*"),
    "Experts": ("max_vio_*", "load_entropy", "dead_experts", "silent_experts", "bias_*", "sigma_*"),
    "Routers and logits": ("router_*", "z", "logit_*", "attention_logit_max"),
    "Speed and progress": ("tokens_per_s", "mfu", "straggler", "data_cursor"),
}
"""Which instruments stand together; a star ends a common beginning of names."""

UNITS = {"share": "percentunit", "share of peak": "percentunit", "tokens/s": "short", "s": "s"}

Panel = dict[str, Any]


def target(expr: str, legend: str = "{{run}}") -> dict[str, Any]:
    """One query of a panel."""
    return {"datasource": SOURCE, "expr": expr, "legendFormat": legend}


def panel(kind: str, title: str, targets: list[dict[str, Any]], **more: Any) -> Panel:
    """A panel without its place; ``more``: unit, description, thresholds, options."""
    defaults: dict[str, Any] = {"unit": more.get("unit", "short")}
    custom: dict[str, Any] = {}
    if kind == "timeseries":
        # Lines, not averages: a spike of one sample has to stay visible.
        custom = {"drawStyle": "line", "lineWidth": 1, "showPoints": "auto", "spanNulls": False}
    if "thresholds" in more:
        custom["thresholdsStyle"] = {"mode": "line"}
        defaults["thresholds"] = {"mode": "absolute", "steps": more["thresholds"]}
    return {
        "type": kind,
        "title": title,
        "description": more.get("description", ""),
        "datasource": SOURCE,
        "targets": [
            {**query, "refId": letter} for query, letter in zip(targets, "ABCDEFGH", strict=False)
        ],
        "fieldConfig": {"defaults": {**defaults, "custom": custom}, "overrides": []},
        "options": more.get("options", {}),
    }


def instrument_panel(row: Instrument) -> Panel:
    """An instrument over time, with its alarm's level where that is a fixed one."""
    more: dict[str, Any] = {}
    base = {"color": "transparent", "value": None}
    color = "red" if row.severity == "page" else "orange"
    if row.alarm == "above":
        more["thresholds"] = [base, {"color": color, "value": row.level}]
    elif row.alarm == "below":
        more["thresholds"] = [
            {"color": color, "value": None},
            {"color": "transparent", "value": row.level},
        ]
    return panel(
        "timeseries",
        row.title,
        [target(gauge_name(row) + RUN)],
        unit=UNITS.get(row.unit, "short"),
        description=f"{row.unit}{row.describe_runs()}. {row.severity}: {row.describe_alarm()}. "
        f"First: {row.first}",
        **more,
    )


def overview() -> list[Panel]:
    """What is running, and what has happened."""
    last = {"reduceOptions": {"calcs": ["lastNotNull"]}}
    age = "time() - trinity_last_step_timestamp_seconds"
    return [
        panel(
            "stat",
            "State",
            [target('trinity_run_state{run=~"$run"} == 1', "{{run}}: {{state}}")],
            options={**last, "textMode": "name"},
        ),
        panel("stat", "Last step", [target("trinity_last_step" + RUN)], options=last),
        panel("stat", "Since the last step", [target(age + RUN)], unit="s", options=last),
        panel(
            "timeseries",
            "Alarms in ten minutes",
            [
                target(
                    f"increase(trinity_alarms_total{RUN}[10m]) > 0", "{{run}} {{name}} {{severity}}"
                )
            ],
        ),
        panel(
            "timeseries",
            "Events in ten minutes",
            [target(f"increase(trinity_events_total{RUN}[10m]) > 0", "{{run}} {{event}}")],
        ),
        panel(
            "timeseries",
            "Tokens per second, over the wall clock",
            [target(f"rate(trinity_tokens_total{RUN}[$__rate_interval])")],
            description="Includes waiting, saving and restarts, unlike the instrument.",
        ),
    ]


def extra(title: str) -> list[Panel]:
    """Panels of a row beside the instruments'."""
    share = "trinity_expert_load_share"
    if title == "Experts":
        return [
            panel(
                "timeseries",
                f"{what} of each layer",
                [target(f'{share}{{run=~"$run", stat="{stat}"}}', "{{run}} layer {{layer}}")],
                description=text,
            )
            for stat, what, text in (
                ("max", "Most loaded expert", "In fair shares: 1 is balanced."),
                ("min", "Least loaded expert", "In fair shares: 0 is a dead expert."),
                ("entropy", "Entropy of the load", "As a share of the most possible."),
            )
        ]
    if title == "Loss":
        by_source = target("trinity_source_loss" + RUN, "{{run}} {{source}}")
        return [panel("timeseries", "Validation loss by source", [by_source])]
    if title == "Speed and progress":
        rates = [
            target(f"trinity_learning_rate_{name}{RUN}", f"{{{{run}}}} {name}")
            for name in ("muon", "adamw")
        ]
        memory = [target("trinity_peak_memory_bytes" + RUN)]
        return [
            panel("timeseries", "Learning rate", rates),
            panel(
                "timeseries", "Duration of a step", [target("trinity_step_seconds" + RUN)], unit="s"
            ),
            panel("timeseries", "Peak memory of rank 0", memory, unit="bytes"),
        ]
    return []


def grouped() -> dict[str, list[Instrument]]:
    """Every exported instrument once, by row."""
    left = {row.name: row for row in exported_instruments()}
    groups: dict[str, list[Instrument]] = {}
    for title, patterns in ROWS.items():
        names = [
            name
            for pattern in patterns
            for name in left
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))
        ]
        groups[title] = [left.pop(name) for name in dict.fromkeys(names)]
    groups["More"] = list(left.values())
    return {title: rows for title, rows in groups.items() if rows}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    rows = {"Overview": overview()}
    for title, instruments in grouped().items():
        rows[title] = [*map(instrument_panel, instruments), *extra(title)]
    panels: list[Panel] = []
    numbers = itertools.count(1)
    y = 0
    for title, inner in rows.items():
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": title, "id": next(numbers), "gridPos": place})
        y += 1
        for at, one in enumerate(inner):
            x, down = at % PANELS_PER_ROW * WIDTH, at // PANELS_PER_ROW * HEIGHT
            place = {"x": x, "y": y + down, "w": WIDTH, "h": HEIGHT}
            panels.append({**one, "id": next(numbers), "gridPos": place})
        y += -(-len(inner) // PANELS_PER_ROW) * HEIGHT
    return {
        "title": "trinity",
        "uid": "trinity-runs",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables()},
        "annotations": {"list": [annotation("page", "red"), annotation("warn", "orange")]},
        "panels": panels,
    }


def variables() -> list[dict[str, Any]]:
    """What is chosen at the top: where the metrics are, and which runs."""
    query = "label_values(trinity_run_state, run)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
        {
            "name": "run",
            "type": "query",
            "label": "Run",
            "datasource": SOURCE,
            "query": {"query": query, "refId": "run"},
            "definition": query,
            "multi": True,
            "includeAll": True,
            "refresh": 2,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def annotation(severity: str, color: str) -> dict[str, Any]:
    """Marks the alarms of one severity in every panel."""
    return {
        "name": f"Alarms ({severity})",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": color,
        "expr": f'increase(trinity_alarms_total{{run=~"$run", severity="{severity}"}}[1m]) > 0',
        "titleFormat": "{{run}}: {{name}}",
        "step": "60s",
    }


def render() -> str:
    """The dashboard's file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    write_or_check(DASHBOARD, render(), __doc__)
