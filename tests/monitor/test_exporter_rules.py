"""The shipped rules and dashboard: true to the table, to the exporter, and to Prometheus itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.alert_rules import EVENT_ALERTS, ROOT, RULES, camel
from tools.grafana_dashboard import DASHBOARD, dashboard
from trinity.core.instruments import instruments
from trinity.monitor.serve_metrics import (
    KNOWN_EVENTS,
    STATES,
    exported_instruments,
    metric_names,
)
from trinity.monitor.webhook import SEVERITY_OF_EVENT

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not on PATH; apt-get install prometheus"
)
METRIC = re.compile(r"\btrinity_[a-z_]+")


def rules() -> dict[str, dict[str, Any]]:
    """All shipped alerting rules by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def queries() -> list[str]:
    """Every query of the shipped dashboard, with Grafana's variables replaced."""
    board = json.loads(DASHBOARD.read_text())
    found = [query["expr"] for panel in board["panels"] for query in panel.get("targets", [])]
    found += [mark["expr"] for mark in board["annotations"]["list"]]
    return [query.replace("$__rate_interval", "1m").replace("$run", ".*") for query in found]


def _promtool(*arguments: str, cwd: Path) -> str:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("generator", ["alert_rules", "grafana_dashboard"])
def test_shipped_file_is_what_its_generator_writes(generator: str) -> None:
    command = [sys.executable, "-m", f"tools.{generator}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_instrument_and_grave_event_has_an_alert() -> None:
    shipped = rules()
    for row in instruments().values():
        rule = shipped[f"Trinity{camel(row.name)}"]
        assert rule["labels"] == {"severity": row.severity, "instrument": row.name}
        assert rule["annotations"]["first_response"] == row.first
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{row.name}"
    assert set(EVENT_ALERTS) == set(SEVERITY_OF_EVENT) - {"alarm", "finished", "silence_over"}
    assert set(EVENT_ALERTS) <= set(KNOWN_EVENTS)


def test_rules_and_dashboard_use_metrics_that_are_exported() -> None:
    expressions = [rule["expr"] for rule in rules().values()] + queries()
    used = {name for expression in expressions for name in METRIC.findall(expression)}
    assert used - metric_names() == set()
    shown = {name for query in queries() for name in METRIC.findall(query)}
    assert {f"trinity_{row.name}" for row in exported_instruments()} - shown == set()


def test_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@needs_promtool
def test_promtool_accepts_the_rules_and_the_example() -> None:
    _promtool("check", "rules", "--lint-fatal", RULES.name, cwd=RULES.parent)
    _promtool("check", "config", "prometheus.yml", cwd=RULES.parent)


def _expected(name: str, run: str, /, **labels: str) -> dict[str, Any]:
    rule = rules()[name]
    annotations = {
        key: text.replace("{{ $labels.run }}", run).replace("{{ $value }}", "1")
        for key, text in rule["annotations"].items()
    }
    own = {key: value for key, value in rule["labels"].items() if "{{" not in value}
    found = {"exp_labels": {**own, **labels}, "exp_annotations": annotations}
    if run:
        found["exp_labels"]["run"] = run
    return found


def _case(
    series: dict[str, str], at: str, name: str, expected: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "interval": "15s",
        "input_series": [{"series": key, "values": text} for key, text in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": name, "exp_alerts": expected}],
    }


def _alarm_cases() -> list[dict[str, Any]]:
    """Each counter stays, then rises by one; at the end of the window its alert is off again."""
    cases = []
    for row in instruments().values():
        if row.alarm == "silence":
            continue
        name = f"Trinity{camel(row.name)}"
        label = f'{{run="base", name="{row.name}", severity="{row.severity}"}}'
        series = {f"trinity_alarms_total{label}": "2x20 3x60"}
        on = [_expected(name, "base", name=row.name)]
        cases += [_case(series, "4m", name, []), _case(series, "6m", name, on)]
        cases.append(_case(series, "17m", name, []))
    for event in EVENT_ALERTS:
        name = f"TrinityEvent{camel(event)}"
        series = {f'trinity_events_total{{run="base", event="{event}"}}': "0x4 1x20"}
        cases.append(_case(series, "2m", name, [_expected(name, "base", event=event)]))
        cases.append(_case(series, "1m", name, []))
    series = {'trinity_alarms_total{run="base", name="other", severity="page"}': "0x4 1x20"}
    other = [_expected("TrinityOther", "base", name="other", severity="page")]
    cases.append(_case(series, "2m", "TrinityOther", other))
    return cases


def _clock_cases() -> list[dict[str, Any]]:
    stamp = 'trinity_last_step_timestamp_seconds{run="base"}'
    on = [_expected("TrinityLastStep", "base")]
    cases = []
    for state in ("starting", "running", "silent", "stopped", "failed", "finished"):
        series = {stamp: "0x60"} | {
            f'trinity_run_state{{run="base", state="{each}"}}': f"{int(each == state)}x60"
            for each in ("starting", "running", "silent", "stopped", "failed", "finished")
        }
        expected = on if state in ("running", "silent") else []
        cases.append(_case(series, "4m", "TrinityLastStep", expected))
        cases.append(_case(series, "2m", "TrinityLastStep", []))
    stepping = {stamp: "0+15x60", 'trinity_run_state{run="base", state="running"}': "1x60"}
    cases.append(_case(stepping, "10m", "TrinityLastStep", []))
    finished_other = {
        stamp: "0x60",
        'trinity_run_state{run="base", state="finished"}': "0x60",
        'trinity_run_state{run="other", state="finished"}': "1x60",
    }
    cases.append(_case(finished_other, "4m", "TrinityLastStep", on))
    return cases


def _watch_cases() -> list[dict[str, Any]]:
    polled = "trinity_watch_last_poll_timestamp_seconds"
    dropped = 'trinity_webhook_messages_total{result="dropped"}'
    absent, stuck = _expected("TrinityWatchAbsent", ""), _expected("TrinityWatchStuck", "")
    return [
        _case({"up": "1x60"}, "6m", "TrinityWatchAbsent", [absent]),
        _case({polled: "0+15x60"}, "6m", "TrinityWatchAbsent", []),
        _case({polled: "0+15x60"}, "6m", "TrinityWatchStuck", []),
        _case({polled: "0x60"}, "4m", "TrinityWatchStuck", [stuck]),
        _case(
            {"trinity_webhook_pending": "1x60"},
            "11m",
            "TrinityWebhookStuck",
            [_expected("TrinityWebhookStuck", "")],
        ),
        _case({"trinity_webhook_pending": "1x8 0x60"}, "11m", "TrinityWebhookStuck", []),
        _case(
            {dropped: "0x4 1x60"},
            "2m",
            "TrinityWebhookDropped",
            [_expected("TrinityWebhookDropped", "", result="dropped")],
        ),
    ]


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    cases = [*_alarm_cases(), *_clock_cases(), *_watch_cases()]
    assert {case["alert_rule_test"][0]["alertname"] for case in cases} == set(rules())
    text = yaml.safe_dump({"rule_files": [str(RULES)], "tests": cases}, sort_keys=False)
    (tmp_path / "cases.yml").write_text(text)
    assert "SUCCESS" in _promtool("test", "rules", "cases.yml", cwd=tmp_path)


def test_every_metric_and_state_is_documented() -> None:
    text = (ROOT / "docs/alerting.md").read_text()
    of_table = {f"trinity_{row.name}" for row in exported_instruments()}
    assert {name for name in metric_names() - of_table if f"`{name}`" not in text} == set()
    rows = "".join(line for line in text.splitlines() if line.startswith("| `trinity_"))
    assert set(METRIC.findall(rows)) - metric_names() - {"trinity_"} == set()
    for state in STATES:
        assert f"`{state}`" in rows
    for event in set(SEVERITY_OF_EVENT) - {"alarm"}:
        assert f"`{event}`" in text
