"""Write launch/prometheus/trinity.rules.yml from the table of instruments.

    python -m tools.alert_rules            # write it
    python -m tools.alert_rules --check    # only compare; exit status 1 when it is out of date

The trainer has judged already: an instrument's alert is that its alarm was raised. Only what a dead
trainer or a dead watcher cannot say is judged by Prometheus.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from trinity.core.instruments import Instrument, instruments
from trinity.monitor.serve_metrics import OTHER
from trinity.monitor.webhook import SEVERITY_OF_EVENT

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "launch/prometheus/trinity.rules.yml"
RUNBOOK = "docs/runbook.md"
WINDOW = "10m"
"""An alert stays on for so long after its alarm; several scrapes and evaluations fit into it."""
QUIET_STATES = "starting|stopped|failed|finished"
"""States in which no step is expected."""

HEAD = """\
# Alerts on the metrics of `trinity watch`. Written by `python -m tools.alert_rules`: edit that, or
# trinity/core/instruments.toml. Wiring: docs/alerting.md.
"""

EVENT_ALERTS = {
    "rewind": (
        "training went back to a checkpoint",
        "Look at the rows that were skipped (the runbook says how). A second rewind at the same "
        "place means that they were not the cause.",
    ),
    "gave_up": (
        "the trainer gave up",
        "The run does not go on by itself. Read the event for the reason, then resume from an "
        "older checkpoint or with another configuration.",
    ),
    "hang": (
        "a rank did not arrive and the job was ended",
        "The event names the rank and its host; drain that node if it happens twice.",
    ),
    "checkpoint_rejected": (
        "a checkpoint did not verify and was passed over",
        "Check the file system; the run went on from an older checkpoint.",
    ),
    "checkpoint_failed": (
        "a checkpoint could not be written",
        "Free space or mend the file system: a crash now loses all steps since the last one.",
    ),
    "replay_mismatch": (
        "a step done twice gave two results",
        "Suspect the hardware of the rank that the event names; drain the node.",
    ),
    "replica_mismatch": (
        "replicas of the model differ",
        "The run has ended. Resume from the last checkpoint before the event, without the node "
        "that it names.",
    ),
}
"""Events that raise an alert beside the alarms: what happened, what to do first."""


def camel(name: str) -> str:
    """``loss_score`` as ``LossScore``."""
    return "".join(part.capitalize() for part in name.split("_"))


def rule(
    alert: str, expr: str, severity: str, summary: str, first: str, anchor: str, **more: Any
) -> dict[str, Any]:
    """One alerting rule; ``more`` replaces or adds fields such as ``wait`` (its ``for``)."""
    return {
        "alert": alert,
        "expr": expr,
        "for": more.pop("wait", "0m"),
        "labels": {"severity": severity, **more},
        "annotations": {"summary": summary, "first_response": first, "runbook_url": anchor},
    }


def instrument_rule(row: Instrument) -> dict[str, Any]:
    """The alert of one instrument."""
    name, anchor = f"Trinity{camel(row.name)}", f"{RUNBOOK}#{row.name}"
    summary = f"{{{{ $labels.run }}}}: {row.title}: {row.describe_alarm()}"
    expr = f'increase(trinity_alarms_total{{name="{row.name}"}}[{WINDOW}]) > 0'
    if row.alarm == "silence":
        # A dead trainer counts nothing. Not `state="silent"`: the time also runs when the watcher
        # is stuck, and its states with it.
        expr = (
            f"time() - trinity_last_step_timestamp_seconds > {row.level:g} unless ignoring (state) "
            f'trinity_run_state{{state=~"{QUIET_STATES}"}} == 1'
        )
    return rule(name, expr, row.severity, summary, row.first, anchor, instrument=row.name)


def other_rule() -> dict[str, Any]:
    """The alert of instruments that the watcher's version of the table does not have."""
    expr = f'increase(trinity_alarms_total{{name="{OTHER}"}}[{WINDOW}]) > 0'
    summary = "{{ $labels.run }}: an alarm that this trinity watch does not know"
    first = "Read the run's event journal; bring the watcher to the trainer's version."
    return rule("TrinityOther", expr, "{{ $labels.severity }}", summary, first, RUNBOOK)


def event_rule(event: str) -> dict[str, Any]:
    """The alert of one kind of event."""
    what, first = EVENT_ALERTS[event]
    expr = f'increase(trinity_events_total{{event="{event}"}}[{WINDOW}]) > 0'
    return rule(
        f"TrinityEvent{camel(event)}",
        expr,
        SEVERITY_OF_EVENT[event],
        f"{{{{ $labels.run }}}}: {what}",
        first,
        f"{RUNBOOK}#{event}",
    )


def watch_rules() -> list[dict[str, Any]]:
    """Alerts on the watcher: without it nothing above can fire."""
    anchor = "docs/alerting.md#the-watcher-itself"
    polled = "trinity_watch_last_poll_timestamp_seconds"
    return [
        rule(
            "TrinityWatchAbsent",
            f"absent({polled})",
            "page",
            "no trinity watch is being scraped: alarms are not seen",
            "Start `trinity watch` again; it keeps its place.",
            anchor,
            wait="5m",
        ),
        rule(
            "TrinityWatchStuck",
            f"time() - {polled} > 120",
            "page",
            "trinity watch has not looked at the runs for two minutes",
            "Most likely the file system with the runs does not answer.",
            anchor,
            wait="1m",
        ),
        rule(
            "TrinityWebhookStuck",
            "trinity_webhook_pending > 0",
            "warn",
            "{{ $value }} messages have waited for ten minutes",
            "Read the watcher's log for the answer of the service; has the address been revoked?",
            anchor,
            wait="10m",
        ),
        rule(
            "TrinityWebhookDropped",
            f'increase(trinity_webhook_messages_total{{result="dropped"}}[{WINDOW}]) > 0',
            "warn",
            "messages to the webhook were dropped",
            "Read the watcher's log: it names the run, step and event of each.",
            anchor,
        ),
    ]


def render() -> str:
    """The rules file."""
    alarms = [*map(instrument_rule, instruments().values()), other_rule()]
    groups = [
        {"name": "trinity-alarms", "rules": alarms},
        {"name": "trinity-events", "rules": [event_rule(event) for event in EVENT_ALERTS]},
        {"name": "trinity-watch", "rules": watch_rules()},
    ]
    text = yaml.safe_dump({"groups": groups}, sort_keys=False, width=100, allow_unicode=True)
    return HEAD + text


def write_or_check(path: Path, text: str, description: str | None) -> None:
    """The command line of this generator: write ``text``, or exit with 1 where it is not there."""
    parser = argparse.ArgumentParser(description=str(description).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path.relative_to(ROOT)} is out of date; run its generator without --check")


if __name__ == "__main__":
    write_or_check(RULES, render(), __doc__)
