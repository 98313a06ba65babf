"""When instruments become alarms: the rules of ``instruments.toml`` over a run's records.

Pure functions of the records, so that the trainer, a replay of an old run and a test all see the
same alarms.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from trinity.core.instruments import Instrument, instruments

MEDIAN_RECORDS = 200
"""Records that "jump" and "slump" compare with."""
SILENCED_RECORDS = 100
"""A cause keeps its consequences quiet for this many records after it was last seen."""


class Alarm(NamedTuple):
    """An instrument that has just gone beyond its level."""

    instrument: Instrument
    step: int
    value: float

    def event(self) -> dict[str, Any]:
        """As a line of the run's journal."""
        row = self.instrument
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {
            "event": "alarm",
            "name": row.name,
            "value": value,
            "condition": row.describe_alarm(),
            "severity": row.severity,
            "text": f"{row.title}: {self.value:.4g}, {row.describe_alarm()}",
            "first": row.first,
        }


class AlarmWatch:
    """Turns records, fed in order, into alarms: one when a level is crossed, not one per record."""

    def __init__(
        self, table: Iterable[Instrument] | None = None, levels: Mapping[str, float] | None = None
    ) -> None:
        """``levels`` replace those of the table, by name."""
        rows = list(instruments().values() if table is None else table)
        levels = levels or {}
        rows = [row.model_copy(update={"level": levels.get(row.name, row.level)}) for row in rows]
        self._gauges = {row.name: _Gauge(row) for row in rows if row.alarm != "silence"}

    def feed(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Alarms that a record (a line of metrics.jsonl) sets off."""
        fed = [
            gauge
            for gauge in self._gauges.values()
            if gauge.row.record == record["kind"] and record.get(gauge.row.key) is not None
        ]
        for gauge in fed:
            gauge.feed(float(record[gauge.row.key]))
        silenced = {
            name
            for gauge in self._gauges.values()
            if gauge.is_recent()
            for name in gauge.row.silences
        }
        return [
            Alarm(gauge.row, int(record["step"]), gauge.value)
            for gauge in fed
            if gauge.take_onset() and gauge.row.name not in silenced
        ]

    def active(self) -> list[str]:
        """Names of the instruments that are beyond their level now."""
        return [name for name, gauge in self._gauges.items() if gauge.is_active]


class _Gauge:
    """One instrument's past, as far as its rule needs it."""

    def __init__(self, row: Instrument) -> None:
        self.row = row
        self.value = math.nan
        self.is_active = False
        self._onset = False
        self._num_fed = 0
        self._streak = 0
        self._since_seen: int | None = None
        self._window: deque[float] = deque(maxlen=MEDIAN_RECORDS)
        self._best = math.inf
        self._before: float | None = None

    def feed(self, value: float) -> None:
        """Take the next value."""
        self.value = value
        beyond = self._is_beyond(value) and self._num_fed >= self.row.after
        self._num_fed += 1
        self._streak = self._streak + 1 if beyond else 0
        was_active, self.is_active = self.is_active, self._streak >= self.row.records
        self._onset = self.is_active and not was_active
        if self.is_active:
            self._since_seen = 0
        elif self._since_seen is not None:
            self._since_seen += 1
        if math.isfinite(value) and not beyond:
            self._window.append(value)
            self._best = min(self._best, value)
        self._before = value

    def is_recent(self) -> bool:
        """Whether the alarm is on, or was a short while ago."""
        return self._since_seen is not None and self._since_seen <= SILENCED_RECORDS

    def take_onset(self) -> bool:
        """Whether the alarm has just come on; once."""
        onset, self._onset = self._onset, False
        return onset

    def _is_beyond(self, value: float) -> bool:
        row = self.row
        if row.alarm == "non_finite":
            return not math.isfinite(value)
        if not math.isfinite(value):
            return False  # the business of the instruments that watch for it
        if row.alarm == "above":
            return value > row.level
        if row.alarm == "below":
            return value < row.level
        if row.alarm == "rise":
            return value > self._best * (1 + row.level)
        if row.alarm == "stuck":
            return self._before is not None and value - self._before < row.level
        if not self._window:
            return False
        median = statistics.median(self._window)
        return value > row.level * median if row.alarm == "jump" else value < row.level * median
