"""Which runs there are below a directory, and how each is doing by the ends of its files."""

from __future__ import annotations

import functools
import json
import os
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trinity.core.instruments import instruments
from trinity.core.run_files import CONFIG_FILE, DONE_FILE, HEARTBEAT_FILE, METRICS_FILE, RECORD_FILE

MARKS_OF_A_RUN = (METRICS_FILE, CONFIG_FILE, RECORD_FILE)
MAX_DEPTH = 3
TAIL_BYTES = 256 << 10
LIFE = ("started", "resumed", "stopped", "finished", "gave_up")
"""Events that say whether a run goes on."""


class RunState(NamedTuple):
    """How a run is doing. Numbers are None where nothing has told them yet."""

    name: str
    """Place below the watched directory."""
    path: Path
    state: str
    """running, silent, stopped, finished, gave up, or waiting (no metrics yet)."""
    silent_s: float
    """Since the run last wrote, seconds."""
    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None

    @property
    def words(self) -> str:
        """The state for people."""
        if self.state == "silent":
            return f"silent for {duration(self.silent_s)}"
        return "no metrics yet" if self.state == "waiting" else self.state


def duration(seconds: float) -> str:
    """A time span in the largest unit that fits: "12 s", "3 min", "5 h", "2 days"."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def find_runs(directory: Path) -> dict[str, Path]:
    """Runs by name: ``directory`` itself if it is one, otherwise those up to three levels below."""
    if _is_run(directory):
        return {directory.resolve().name: directory}
    found = {str(path.relative_to(directory)): path for path in _below(directory, MAX_DEPTH)}
    return dict(sorted(found.items()))


def run_state(name: str, path: Path, now: float | None = None) -> RunState:
    """How a run is doing ``now`` (unix seconds; by default the clock's).

    Its clock is the last change of its files: "silent" is a run that has not said that it ended
    and has not written for as long as the instrument ``last_step`` allows.
    """
    now = time.time() if now is None else now
    metrics = path / METRICS_FILE
    written = max(_modified(path / HEARTBEAT_FILE), _modified(metrics))
    silent_s = max(0.0, now - written) if written else 0.0
    end = _end_of(metrics)
    if (path / DONE_FILE).exists():
        state = "finished"
    elif end.ended:
        state = end.ended.replace("_", " ")
    elif not _modified(metrics):
        state = "waiting"
    elif silent_s > instruments()["last_step"].level:
        state = "silent"
    else:
        state = "running"
    return RunState(name, path, state, silent_s, end.step, end.loss, end.tokens_per_s)


def flat_config(path: Path) -> dict[str, str]:
    """A TOML file as dotted keys and values in words; empty where it is missing or damaged."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(_flat(values, ""))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                yield from _flat(item, f"{prefix}{key}.{number}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in MARKS_OF_A_RUN)


def _below(directory: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(directory) as entries:
            children = sorted(entry.path for entry in entries if entry.is_dir())
    except OSError:
        return
    for child in map(Path, children):
        if _is_run(child):
            yield child
        elif depth > 1 and not child.name.startswith("."):
            yield from _below(child, depth - 1)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class _End(NamedTuple):
    """What the last lines of metrics.jsonl tell."""

    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    ended: str = ""


def _end_of(metrics: Path) -> _End:
    try:
        status = metrics.stat()
    except OSError:
        return _End()
    return _read_end(metrics, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _read_end(metrics: Path, _size: int, _mtime_ns: int) -> _End:
    """Size and time are there to be told apart by: a file is read again only if it has changed."""
    ended, train = None, None
    for record in reversed(_tail(metrics)):
        if ended is None and (record.get("event") in LIFE or record.get("kind") == "train"):
            event = record.get("event", "")
            ended = event if event in ("stopped", "finished", "gave_up") else ""
        if record.get("kind") == "train":
            train = record
            break
    if train is None:
        return _End(ended=ended or "")
    return _End(
        train["step"], _float(train.get("loss")), _float(train.get("tokens_per_s")), ended or ""
    )


def _tail(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            block = file.read()
    except OSError:
        return []
    records = []
    for line in block.split(b"\n")[size > TAIL_BYTES :]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
