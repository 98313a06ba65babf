"""Alarms, journal and differences of configuration as HTML. All text of a run is escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from trinity.core.instruments import instruments
from trinity.core.run_files import CONFIG_FILE
from trinity.monitor.catalog import RunState, duration, flat_config
from trinity.monitor.history import History

MAX_CARDS = 12
MAX_JOURNAL = 30
MAX_EVENTS = 400
PILLS = {"running": "good", "silent": "page", "gave up": "page", "finished": "plain"}


class AlarmRow(NamedTuple):
    """Alarms of one instrument of one run, taken together."""

    run: str
    name: str
    title: str
    severity: str
    condition: str
    value: str
    first: str
    count: int
    first_step: int
    last_step: int
    time: float | None


def alarm_rows(histories: Mapping[str, History]) -> list[AlarmRow]:
    """Alarms of runs, one row per instrument, the latest first.

    What to do first comes from the event, from the table of instruments where it has none.
    """
    rows: dict[tuple[str, str], AlarmRow] = {}
    for run, history in histories.items():
        with history.lock:
            alarms = [e for e in history.events if e.get("event") == "alarm"]
        for event in alarms:
            name = str(event.get("name", "alarm"))
            known = instruments().get(name)
            before = rows.get((run, name))
            rows[run, name] = AlarmRow(
                run,
                name,
                known.title if known else name,
                str(event.get("severity", known.severity if known else "warn")),
                str(event.get("condition", known.describe_alarm() if known else "")),
                number(event.get("value")),
                str(event.get("first", known.first if known else "")),
                (before.count if before else 0) + 1,
                before.first_step if before else event["step"],
                event["step"],
                event.get("time"),
            )
    return sorted(rows.values(), key=lambda row: (row.time or 0, row.last_step), reverse=True)


def alarms_html(
    histories: Mapping[str, History],
    states: Mapping[str, RunState],
    colors: Mapping[str, str],
    problems: Mapping[str, str],
) -> str:
    """Cards: runs that are silent or cannot be read, then alarms."""
    cards = []
    silence = instruments()["last_step"]
    for name in histories:
        state = states.get(name)
        if name in problems:
            text = f"The record cannot be followed: {problems[name]}"
            cards.append(_card("page", name, colors, "Monitor", text, ""))
        if state is None:
            text = "The directory is gone. What is shown was read before."
            cards.append(_card("warn", name, colors, "Run", text, ""))
        elif state.state == "silent":
            text = f"no step for {duration(state.silent_s)}, last step {state.step}"
            cards.append(_card(silence.severity, name, colors, silence.title, text, silence.first))
    rows = alarm_rows(histories)
    for row in rows[:MAX_CARDS]:
        times = f"step {row.last_step:,}"
        if row.count > 1:
            times = f"{row.count} times, steps {row.first_step:,} to {row.last_step:,}"
        text = f"{row.value}, {row.condition} · {times}{_when(row.time)}"
        cards.append(_card(row.severity, row.run, colors, row.title, text, row.first))
    if len(rows) > MAX_CARDS:
        cards.append(f"<p class=faint>and {len(rows) - MAX_CARDS} older ones</p>")
    return "<h2>Alarms</h2>" + ("".join(cards) or "<p class=faint>No alarm so far.</p>")


def _card(
    severity: str, run: str, colors: Mapping[str, str], title: str, text: str, first: str
) -> str:
    is_page = severity == "page"
    todo = f"<div class=first><b>Do first:</b> {escape(first)}</div>" if first else ""
    return (
        f'<div class="card {"severe" if is_page else ""}">'
        f'<span class="pill {"page" if is_page else "warn"}">{"PAGE" if is_page else "WARN"}</span>'
        f" <b>{escape(title)}</b><br>{_dot(run, colors)}{escape(run)}: {escape(text)}{todo}</div>"
    )


def journal_html(histories: Mapping[str, History], colors: Mapping[str, str]) -> str:
    """The latest events of runs, newest first; a row of the same ones is one line."""
    events = []
    for run, history in histories.items():
        with history.lock:
            events += [(run, event) for event in history.events[-MAX_EVENTS:]]
    events.sort(key=lambda pair: (pair[1].get("time") or 0, pair[1]["step"]))
    lines: list[tuple[str, dict[str, Any], int, int]] = []
    for run, event in events:
        before = lines[-1] if lines else None
        if before and (before[0], before[1].get("event")) == (run, event.get("event")):
            lines[-1] = (run, event, before[2], before[3] + 1)
        else:
            lines.append((run, event, event["step"], 1))
    rows = "".join(_journal_row(*line, colors) for line in reversed(lines[-MAX_JOURNAL:]))
    head = "<tr><th class=number>UTC</th><th class=number>step</th><th>event</th></tr>"
    return "<h2>Journal</h2>" + (
        f"<table>{head}{rows}</table>" if rows else "<p class=faint>No event so far.</p>"
    )


def _journal_row(
    run: str, event: dict[str, Any], first_step: int, count: int, colors: Mapping[str, str]
) -> str:
    times = f" {count} times since step {first_step:,}; last:" if count > 1 else ""
    return (
        f"<tr><td class=number>{_clock(event.get('time'))}</td>"
        f"<td class=number>{event['step']:,}</td>"
        f"<td>{_dot(run, colors)}<b>{escape(str(event.get('event')))}</b>{times} "
        f"{escape(str(event.get('text', '')))}</td></tr>"
    )


def config_html(runs: Mapping[str, Path], colors: Mapping[str, str]) -> str:
    """Keys that differ between runs; of one run, what changed when it was resumed."""
    columns: dict[str, dict[str, str]] = {}
    dots: dict[str, str] = {}
    for name, path in runs.items():
        older = sorted(path.glob("config.until-step-*.toml"), key=_until_step)
        for file in older if len(runs) == 1 else []:
            columns[f"until step {_until_step(file):,}"] = flat_config(file)
        columns[name] = flat_config(path / CONFIG_FILE)
        dots[name] = _dot(name, colors)
    if len(columns) < 2:
        return (
            "<p class=faint>Select two runs or more to see where their configurations differ.</p>"
        )
    keys = sorted({key for column in columns.values() for key in column})
    differing = [k for k in keys if len({column.get(k) for column in columns.values()}) > 1]
    if not differing:
        return "<p class=faint>The configurations are the same.</p>"
    head = "".join(f"<th>{dots.get(name, '')}{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td><b>{escape(key)}</b></td>"
        + "".join(f"<td>{escape(column.get(key, '—'))}</td>" for column in columns.values())
        + "</tr>"
        for key in differing
    )
    return f"<h2>Configuration: what differs</h2><table><tr><th>key</th>{head}</tr>{rows}</table>"


def runs_html(states: list[RunState], colors: Mapping[str, str]) -> str:
    """The list of runs, for the report; the live page has a table to select from."""
    rows = "".join(
        f"<tr><td>{_dot(s.name, colors)}{escape(s.name)}</td>"
        f'<td><span class="pill {PILLS.get(s.state, "plain")}">{escape(s.words)}</span></td>'
        f"<td class=number>{'—' if s.step is None else f'{s.step:,}'}</td>"
        f"<td class=number>{number(s.loss)}</td><td class=number>{number(s.tokens_per_s)}</td></tr>"
        for s in states
    )
    head = "<th>run</th><th>state</th>" + "".join(
        f"<th class=number>{title}</th>" for title in ("step", "loss", "tokens/s")
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def number(value: Any) -> str:
    """A number for people, four digits; a dash where there is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float):
        return "—"
    if math.isfinite(value) and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _dot(run: str, colors: Mapping[str, str]) -> str:
    return f'<span class=dot style="background:{colors.get(run, "#606060")}"></span>'


def _clock(moment: Any) -> str:
    if not isinstance(moment, int | float) or not 0 < moment < 4e9:
        return ""
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(moment))


def _when(moment: Any) -> str:
    clock = _clock(moment)
    return f" · {clock} UTC" if clock else ""


def _until_step(path: Path) -> int:
    digits = path.stem.rsplit("-", 1)[-1]
    return int(digits) if digits.isdigit() else 0
