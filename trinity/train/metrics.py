"""Where a run's numbers go: JSON lines (the record), TensorBoard, the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trinity.core.run_files import METRICS_FILE
from trinity.train.sink import LineSink

_HEAD = re.compile(r'\{"kind": "(\w+)", "step": (\d+)[,}]')
"""How every line begins."""
PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask."""


class MetricsWriter:
    """Appends one JSON object per line and mirrors numbers to TensorBoard.

    Opened at step N, it first drops what a run that died later had written beyond N, a torn last
    line included but events not, so that the file always reads as one uninterrupted run.
    """

    def __init__(
        self, run_dir: Path, *, start_step: int, tensorboard: bool, quiet: bool = False
    ) -> None:
        """``quiet`` writes nothing: of the processes of a job, only the first keeps the record."""
        self.path = run_dir / METRICS_FILE
        self._tensorboard = None
        self._sink: LineSink | None = None
        if quiet:
            return
        _truncate_after(self.path, start_step)
        self._sink = LineSink(self.path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record ``values`` under ``kind`` ("train", "validation", "event") at ``step``."""
        if self._sink is None:
            return
        row = {"kind": kind, "step": step, "time": time.time(), **values}
        self._sink.write(json.dumps(row))
        try:
            self._mirror(kind, step, values)
        except OSError as error:
            warnings.warn(f"no more TensorBoard in this attempt: {error}", stacklevel=2)
            self._tensorboard = None

    def _mirror(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._tensorboard is None or kind == "event":
            return
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close both sinks."""
        if self._sink is not None:
            self._sink.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()


def read_metrics(run_dir: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The recorded lines of a run, all kinds or one.

    Left out are a torn last line, and steps that a rewind has abandoned; events never are.
    """
    rows: list[dict[str, Any]] = []
    with (Path(run_dir) / METRICS_FILE).open(encoding="utf-8") as file:
        for line in file:
            found = _HEAD.match(line)
            if found is not None and kind not in (None, found[1]) and found[1] != "event":
                continue  # a long record has lines of steps by the gigabyte
            row = _parse(line)
            if row is None:
                continue
            if row.get("event") == "rewind":
                rows = [own for own in rows if _outlasts(own["kind"], own["step"], row["to_step"])]
            if kind in (None, row["kind"]):
                rows.append(row)
    return rows


def _outlasts(kind: str, own_step: int, step: int) -> bool:
    """Whether a line stays when the run goes back to ``step``: what happened, happened."""
    return kind == "event" or own_step <= step


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _truncate_after(path: Path, step: int) -> None:
    """Line by line, and only where there is something to cut: a record may not fit in memory."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        if all(_stays(line, step) for line in file):
            return
    temporary = path.with_suffix(".tmp")
    with path.open(encoding="utf-8") as file, temporary.open("w", encoding="utf-8") as target:
        target.writelines(line for line in file if _stays(line, step))
    os.replace(temporary, path)


def _stays(line: str, step: int) -> bool:
    """Whether a line is whole, and no step beyond ``step``."""
    if not line.endswith("}\n"):
        return False
    found = _HEAD.match(line)
    return found is not None and _outlasts(found[1], int(found[2]), step)


class Reporter:
    """Tells a person how the run goes: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, *, num_steps: int, start_step: int, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._progress: Progress | None = None
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        else:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "train", total=num_steps, completed=start_step, status=""
            )
        self._plain_every = max(1, num_steps // 50)
        self._num_steps = num_steps

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int, status: str) -> None:
        """Report that ``step`` is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)
        elif step % self._plain_every == 0 or step in (1, self._num_steps):
            self.say(f"step {step:>6}/{self._num_steps}  {status}")

    def show(self, table: Table) -> None:
        """Print a table, as wide as it needs to be."""
        with contextlib.suppress(OSError):
            self.console.print(table, soft_wrap=False)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one.

        A log on a full disk must not end the training; Python keeps the text and tries again.
        """
        with contextlib.suppress(OSError):
            self.console.print(text, markup=False)
