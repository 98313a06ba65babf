"""One run as the watcher sees it: newest records, state, counted events, and what is news."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity.core.instruments import instruments
from trinity.core.run_files import CONFIG_FILE, DONE_FILE, HEARTBEAT_FILE, METRICS_FILE
from trinity.monitor.serve_metrics import (
    KNOWN_EVENTS,
    OTHER,
    RunFacts,
    alarm_labels,
    load_share,
    number,
)
from trinity.monitor.tail import JsonLinesTail, Position
from trinity.monitor.webhook import SEVERITY_OF_EVENT, identify

START_S = 1800.0
"""Building data, compiling and reading a checkpoint may take so long before the first step."""
ACTIVE_S = 86400.0
"""A run without a sign of life for a day is history: not exported, and not called silent."""
HOLD_S = 60.0
"""Counters of a run that is new here show for so long what was counted before: Prometheus sees an
increase only between two scrapes."""
MAX_SEEN = 2000
"""Events remembered, to know them again in a file that was rewritten."""

LIFE_EVENTS = frozenset({"started", "resumed", "stopped", "finished", "gave_up"})
STEPPING = "stepping"
STATE_OF_LIFE = {"stopped": "stopped", "gave_up": "failed", "finished": "finished"}
_KIND = re.compile(rb'\{"kind": ?"(train|instruments|validation|checkpoint)"')


class FollowedRun:
    """Reads one run's files. Not thread-safe."""

    def __init__(
        self,
        directory: Path,
        name: str,
        place: Mapping[str, Any] | None,
        *,
        news_since: float,
        now: float,
    ) -> None:
        """Follow ``directory``.

        Args:
            name: of the run, in labels and messages.
            place: what :meth:`place` returned in an earlier life; None reads from the beginning.
            news_since: without a place, events from before this (unix seconds) are no news.
            now: unix seconds.
        """
        self.directory = directory
        self.name = name
        saved = place or {}
        self._tail = JsonLinesTail(directory / METRICS_FILE, Position(*saved.get("position", ())))
        self._latest: dict[str, dict[str, Any]] = dict(saved.get("latest", {}))
        self._load_shares = [tuple(shares) for shares in saved.get("load_shares", [])]
        self._events = Counter[str](saved.get("events", {}))
        self._alarms = Counter({(row[0], row[1]): row[2] for row in saved.get("alarms", [])})
        self._seen: dict[str, float] = dict(saved.get("seen", {}))
        self._forgotten_until: float = saved.get("forgotten_until", 0.0)
        self._life: str = saved.get("life", "")
        self._life_step: int = saved.get("life_step", 0)
        self._pulse: list[Any] = saved.get("pulse", [])
        self._last_progress: float | None = saved.get("last_progress")
        self._started_at: float | None = saved.get("started_at")
        self._is_silent: bool = saved.get("is_silent", False)
        self._is_done: bool = saved.get("is_done", False)
        self._tokens: float | None = saved.get("tokens")
        self._repeated_tokens: float = saved.get("repeated_tokens", 0.0)
        self._news_since = None if place else news_since
        self._is_first_poll = True
        self._unhandled: list[dict[str, Any]] = []
        self._hold_until = now + HOLD_S
        self._held = (Counter(self._events), Counter(self._alarms))
        self._seen_at = now

    @property
    def last_sign(self) -> float:
        """Unix seconds of the last step or start; 0 when nothing is known."""
        return max(self._last_progress or 0.0, self._started_at or 0.0)

    def is_active(self, now: float) -> bool:
        """Whether it is new here, or gave a sign of life in the last day (``now``: unix s)."""
        return self._is_first_poll or now - self.last_sign <= ACTIVE_S

    def poll(self, now: float) -> list[dict[str, Any]]:
        """Read what is new; returns the events that somebody should be told, in order.

        Raises OSError when a file is there and cannot be read; nothing is lost by that.
        """
        self._seen_at = now
        heartbeat, beat_at = self._heartbeat()
        if heartbeat and not self._is_first_poll and heartbeat != self._pulse[:1]:
            self._note_step(heartbeat[0][0])  # a later event overrules it
        self._read()
        news = [record for record in self._unhandled if self._count(record, now)]
        self._unhandled.clear()
        self._take_pulse(heartbeat, beat_at, now)
        news += self._watch_end(now) + self._watch_silence(now)
        self._is_first_poll = False
        return [record for record in news if record["event"] in SEVERITY_OF_EVENT]

    def facts(self, now: float) -> RunFacts:
        """What is exported of the run."""
        events, alarms = self._held if now < self._hold_until else (self._events, self._alarms)
        train = self._latest.get("train", {})
        tokens = None if self._tokens is None else self._tokens + self._repeated_tokens
        return RunFacts(
            name=self.name,
            state=self.state(now),
            last_step=train.get("step"),
            last_progress=self._started_at if self._last_progress is None else self._last_progress,
            tokens_total=tokens,
            latest=self._latest,
            load_shares=self._load_shares,
            events=events,
            alarms=alarms,
            num_bad_lines=self._tail.num_bad_lines,
        )

    def state(self, now: float) -> str:
        """One of ``serve_metrics.STATES``."""
        if self._is_done:
            return "finished"
        if self._life in STATE_OF_LIFE:
            return STATE_OF_LIFE[self._life]
        if self._life == STEPPING and self._last_progress is not None:
            is_silent = now - self._last_progress > instruments()["last_step"].level
            return "silent" if is_silent else "running"
        return "silent" if now - (self._started_at or now) > START_S else "starting"

    def place(self) -> dict[str, Any]:
        """Plain values from which another process continues; see ``__init__``."""
        return {
            "position": list(self._tail.position),
            "latest": self._latest,
            "load_shares": self._load_shares,
            "events": self._events,
            "alarms": [[*label, count] for label, count in self._alarms.items()],
            "seen": self._seen,
            "forgotten_until": self._forgotten_until,
            "life": self._life,
            "life_step": self._life_step,
            "pulse": self._pulse,
            "last_progress": self._last_progress,
            "started_at": self._started_at,
            "is_silent": self._is_silent,
            "is_done": self._is_done,
            "tokens": self._tokens,
            "repeated_tokens": self._repeated_tokens,
            "seen_at": self._seen_at,
        }

    def _read(self) -> None:
        """Take in the new lines, their events into ``_unhandled``.

        Of the other kinds only the newest line counts, and only that is parsed: the lists of large
        models make a line hundreds of kilobytes long.
        """
        more = True
        while more:
            lines, restarted, more = self._tail.read()
            if restarted:
                self._latest, self._load_shares = {}, []
            newest: dict[bytes, bytes] = {}
            for line in lines:
                match = _KIND.match(line)
                if match:
                    newest[match[1]] = line
                elif (record := self._tail.parse(line)) is not None:
                    if record["kind"] == "event":
                        record["event"] = str(record.get("event"))
                        self._unhandled.append(record)
                        if record["event"] in LIFE_EVENTS:
                            self._life, self._life_step = record["event"], record["step"]
                    else:
                        self._keep(record)
            for line in newest.values():
                if (record := self._tail.parse(line)) is not None:
                    self._keep(record)

    def _note_step(self, step: int | str) -> None:
        """A step was made. One that an event says the run was at is not a sign of more: its record
        may be written after the event."""
        with contextlib.suppress(ValueError):  # a heartbeat that is being written
            if not self._life or int(step) > self._life_step:
                self._life = STEPPING

    def _keep(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "train":
            self._note_step(record["step"])
            with contextlib.suppress(TypeError):  # no list of lists of numbers
                self._load_shares = [load_share(load_E) for load_E in record.get("load", [])]
            tokens = number(record.get("num_tokens_seen"))
            if tokens is not None:
                # A counter must not fall: what a rewind or a resume takes back is counted again.
                if self._tokens is not None and tokens < self._tokens:
                    self._repeated_tokens += self._tokens - tokens
                self._tokens = tokens
        self._latest[kind] = {
            key: value for key, value in record.items() if not isinstance(value, list | dict)
        }

    def _count(self, record: dict[str, Any], now: float) -> bool:
        """Count an event unless it was counted before; True if it is news."""
        at = number(record.get("time")) or 0.0
        name = identify(self.name, record)
        if name in self._seen or at <= self._forgotten_until > 0:
            return False
        self._seen[name] = at
        while len(self._seen) > MAX_SEEN:
            oldest = next(iter(self._seen))
            self._forgotten_until = max(self._forgotten_until, self._seen.pop(oldest))
        is_history = self._is_first_poll and self._news_since is not None and at < self._news_since
        event, label = record["event"], None
        if event == "alarm":
            label = (str(record.get("name")), str(record.get("severity")))
            if label not in _LABELS:
                label = (OTHER, "page" if label[1] == "page" else "warn")
        # History raises no alert: it is in the counters from the first scrape on.
        for events, alarms in [(self._events, self._alarms), *([self._held] if is_history else [])]:
            events[event if event in KNOWN_EVENTS else OTHER] += 1
            if label is not None:
                alarms[label] += 1
        if event in ("started", "resumed"):
            self._started_at = min(now, at) if self._is_first_poll and at else now
        return not is_history

    def _heartbeat(self) -> tuple[list[Any], float]:
        """What changes in the heartbeat with every step, and when it did; empty without one."""
        path = self.directory / HEARTBEAT_FILE
        try:
            status = path.stat()
            return [
                [path.read_text(encoding="utf-8", errors="replace")[:40], status.st_mtime_ns]
            ], (status.st_mtime)
        except FileNotFoundError:
            return [], 0.0

    def _take_pulse(self, heartbeat: list[Any], beat_at: float, now: float) -> None:
        """Note progress. Seen while watching it happened now, whatever other machines' clocks say;
        what happened before is dated by the files."""
        train = self._latest.get("train", {})
        pulse = [*(heartbeat or [None]), train.get("step"), train.get("time")]
        if pulse == self._pulse:
            return
        self._pulse = pulse
        if not heartbeat and not train:
            if self._started_at is None:
                self._started_at = min(now, self._born_at(now))
            return
        written_at = number(train.get("time")) or 0.0
        if heartbeat and heartbeat[0][0].strip() != str(train.get("step")):
            written_at = max(written_at, beat_at)  # a step that was not logged
        if self._is_first_poll:
            self._last_progress = min(now, written_at or self._born_at(now))
            if not self._life or (
                self._life in ("started", "resumed") and written_at > (self._started_at or 0.0)
            ):
                self._life = STEPPING
        else:
            self._last_progress = now

    def _born_at(self, now: float) -> float:
        for name in (METRICS_FILE, CONFIG_FILE):
            with contextlib.suppress(OSError):
                return (self.directory / name).stat().st_mtime
        return now

    def _watch_end(self, now: float) -> list[dict[str, Any]]:
        """The event of a run that has finished, where the trainer has not written it."""
        path = self.directory / DONE_FILE
        was_done, self._is_done = self._is_done, os.path.exists(path)
        if was_done or not self._is_done or self._life == "finished":
            return []
        try:
            at = min(now, path.stat().st_mtime)
        except OSError:  # gone again: it is being resumed
            return []
        step = self._latest.get("train", {}).get("step", 0)
        record = {"kind": "event", "step": step, "time": at, "event": "finished"}
        record["text"] = f"finished at step {step}"
        return [record] if self._count(record, now) else []

    def _watch_silence(self, now: float) -> list[dict[str, Any]]:
        """The alarm that a dead trainer cannot raise, when it comes on and when it is over."""
        state = self.state(now)
        is_silent = state == "silent"
        if is_silent == self._is_silent or (is_silent and now - self.last_sign > ACTIVE_S):
            return []
        self._is_silent = is_silent
        row = instruments()["last_step"]
        step = self._latest.get("train", {}).get("step", 0)
        record: dict[str, Any] = {"kind": "event", "step": step, "time": now}
        if is_silent:
            silence_s = now - self.last_sign
            record |= {
                "event": "alarm",
                "name": row.name,
                "value": silence_s,
                "condition": row.describe_alarm(),
                "severity": row.severity,
                "text": f"{row.title}: {silence_s:.0f} s, {row.describe_alarm()}",
                "first": row.first,
            }
            self._count(record, now)
        elif state == "running":
            record |= {"event": "silence_over", "text": "steps are being made again"}
        else:
            return []
        return [record]


_LABELS = frozenset(alarm_labels())
