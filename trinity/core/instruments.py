"""The table of instruments: what a run is watched by, when that is an alarm, what to do first.

One table, ``instruments.toml`` beside this file, for documentation, dashboard, alarms and the
Prometheus rules.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Literal

from pydantic import Field

from trinity.core.tables import NonNegative, Positive, Table

Rule = Literal["above", "below", "jump", "slump", "rise", "stuck", "non_finite", "silence"]


class Instrument(Table):
    """One row of the table; the head of ``instruments.toml`` explains the fields."""

    name: str
    title: str
    unit: str
    record: Literal["train", "instruments", "validation", "clock"]
    runs: Literal["all", "text", "images"] = "all"
    key: str
    alarm: Rule
    level: float = 0.0
    records: Positive = 1
    after: NonNegative = 0
    severity: Literal["warn", "page"]
    silences: tuple[str, ...] = ()
    first: str = Field(min_length=1)

    def describe_alarm(self) -> str:
        """The alarm's condition in words, such as "above 6, 3 records in a row"."""
        unit = "" if self.unit == "1" else f" {self.unit}"
        words = {
            "above": f"above {self.level:g}{unit}",
            "below": f"below {self.level:g}{unit}",
            "jump": f"{self.level:g} times its median",
            "slump": f"below {self.level:g} times its median",
            "rise": f"{self.level:.0%} above its best",
            "stuck": "not growing",
            "non_finite": "not finite",
            "silence": f"no step for {self.level:g} s",
        }
        row = f", {self.records} records in a row" if self.records > 1 else ""
        return words[self.alarm] + row

    def describe_runs(self) -> str:
        """Which runs alone have it, such as ", runs on images"; nothing for all."""
        return "" if self.runs == "all" else f", runs on {self.runs}"


@functools.cache
def instruments() -> dict[str, Instrument]:
    """All instruments by name, in the order of the table."""
    text = resources.files("trinity.core").joinpath("instruments.toml").read_text(encoding="utf-8")
    return {
        name: Instrument(**{"name": name, "key": name, **row})
        for name, row in tomllib.loads(text).items()
    }
