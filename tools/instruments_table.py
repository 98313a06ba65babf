"""Write what docs/stability.md and docs/runbook.md repeat of the table of instruments.

    python -m tools.instruments_table            # write it
    python -m tools.instruments_table --check    # only compare; exit status 1 when out of date

In stability.md that is the table and what the checks cost, between markers; in runbook.md the quote
under each heading that names an instrument or an event: severity, condition, what to do first.
"""

from __future__ import annotations

import json
import re

from tools.alert_rules import EVENT_ALERTS, ROOT, write_or_check
from trinity.core.instruments import Instrument, instruments
from trinity.monitor.webhook import SEVERITY_OF_EVENT

STABILITY = ROOT / "docs/stability.md"
RUNBOOK = ROOT / "docs/runbook.md"
COSTS = ROOT / "tools/bench/results/instruments_cpu.json"


def instruments_table() -> str:
    """Every instrument: where its values are, when it raises an alarm, what that keeps quiet."""
    lines = [
        "| instrument | unit | line, key | alarm | severity | keeps quiet |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in instruments().values():
        quiet = ", ".join(f"`{name}`" for name in row.silences)
        lines.append(
            f"| [`{row.name}`](runbook.md#{row.name}): {row.title} | {row.unit} | {_place(row)} | "
            f"{_condition(row)} | {row.severity} | {quiet} |"
        )
    return "\n".join(lines)


def costs() -> str:
    """What was measured of the instruments and of a replay, in a sentence."""
    found = json.loads(COSTS.read_text(encoding="utf-8"))
    times = found["cpu_ms"]
    return (
        f"Measured with the model of `{found['config']}`, {found['precision']}, one thread of a "
        f"CPU: reading the instruments every {found['every_steps']} steps costs "
        f"{found['overhead']:.1%} of the time; a replay takes {times['replay of a step'] / 1e3:.1f}"
        f" s beside a step of {times['plain step'] / 1e3:.1f} s "
        f"(`{COSTS.relative_to(ROOT)}`)."
    )


def instrument_quote(row: Instrument) -> str:
    """What the runbook quotes under an instrument's heading."""
    place = f" Lines `{row.record}`, key `{row.key}`{row.describe_runs()}."
    place = "" if row.record == "clock" else place
    return f"> **{row.severity}**: {row.title}: {_condition(row)}.{place}\n>\n> First: {row.first}"


def event_quote(event: str) -> str:
    """What the runbook quotes under an event's heading."""
    what, first = EVENT_ALERTS[event]
    return f"> **{SEVERITY_OF_EVENT[event]}**: {what}.\n>\n> First: {first}"


def with_sections(text: str) -> str:
    """``text`` with every marked section as it should be."""
    for name, section in (("instruments", instruments_table()), ("costs", costs())):
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{section}\n{end}{after}"
    return text


def with_quotes(text: str) -> str:
    """``text`` with the right quote under every heading that has one."""
    quotes = {row.name: instrument_quote(row) for row in instruments().values()}
    quotes |= {event: event_quote(event) for event in EVENT_ALERTS}

    def heading(match: re.Match[str]) -> str:
        quote = quotes.get(match["name"])
        return match[0] if quote is None else f"## {match['name']}\n\n{quote}\n\n"

    return re.sub(r"^## (?P<name>\w+)\n\n(?:(?:>.*\n)+\n)?", heading, text, flags=re.MULTILINE)


def _place(row: Instrument) -> str:
    place = f"`{row.record}`, `{row.key}`{row.describe_runs()}"
    return "the clock" if row.record == "clock" else place


def _condition(row: Instrument) -> str:
    return row.describe_alarm().replace("|", "\\|")


if __name__ == "__main__":
    for path, render in ((STABILITY, with_sections), (RUNBOOK, with_quotes)):
        write_or_check(path, render(path.read_text(encoding="utf-8")), __doc__)
