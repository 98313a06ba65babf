"""Numbers of a run as columns on disk: appended, never rewritten, read by memory map.

A table holds the lines of one kind. Its file order is that of ``metrics.jsonl``; lines that a later
rewind abandoned stay, and :attr:`Table.live` says which rows count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_COLUMNS = 256
"""Keys beyond these are left out: a file with a key per step must not make a file per step."""
OFFSET = "@offset"
"""Column with the place of a line in ``metrics.jsonl``, in bytes."""


class Table:
    """Lines of one kind; every number of a line is a cell, 8 bytes, NaN where a line lacks it."""

    def __init__(self, directory: Path, kind: str, state: Mapping[str, Any] | None = None) -> None:
        """``state`` is what :meth:`state` told before; rows written after it do not count.

        Raises:
            OSError: a file of the state is missing.
            ValueError: one is too short.
        """
        state = state or {}
        self._directory = directory
        self._kind = kind
        self.num_rows = int(state.get("num_rows", 0))
        self._columns: dict[str, int] = dict(state.get("columns", {}))
        self.live: list[tuple[int, int]] = [(int(a), int(b)) for a, b in state.get("live", [])]
        self.last_step = int(state.get("last_step", -1))
        for key in self._columns:
            if self._path(key).stat().st_size < 8 * self.num_rows:
                raise ValueError(f"{self._path(key)}: shorter than {self.num_rows} rows")

    def state(self) -> dict[str, Any]:
        """What :meth:`__init__` needs to continue."""
        return {
            "num_rows": self.num_rows,
            "columns": self._columns,
            "live": self.live,
            "last_step": self.last_step,
        }

    def keys(self) -> list[str]:
        """Names of the numbers that any line had."""
        return [key for key in self._columns if key != OFFSET]

    def append(self, records: Sequence[Mapping[str, Any]], offsets: Sequence[int]) -> None:
        """Add lines whose steps ascend and lie beyond :attr:`last_step`."""
        if not records:
            return
        keys = dict.fromkeys(key for record in records for key in record)
        for key in [key for key in keys if key not in self._columns]:
            if len(self._columns) < MAX_COLUMNS:
                self._add_column(key, records)
        for key in self._columns:
            cells: Sequence[Any] = offsets if key == OFFSET else [r.get(key) for r in records]
            with self._path(key).open("r+b") as file:
                file.seek(8 * self.num_rows)  # not the end: an append before may have failed
                file.write(_numbers(cells).tobytes())
        start, self.num_rows = self.num_rows, self.num_rows + len(records)
        if self.live and self.live[-1][1] == start:
            self.live[-1] = (self.live[-1][0], self.num_rows)
        else:
            self.live.append((start, self.num_rows))
        self.last_step = int(records[-1]["step"])

    def abandon(self, step: int) -> None:
        """Lines of ``step`` and later no longer count: the run goes over these steps again."""
        steps = self.column("step")
        while self.live:
            start, end = self.live.pop()
            kept = start + int(np.searchsorted(steps[start:end], step))
            if kept > start:
                self.live.append((start, kept))
                break
        self.last_step = int(steps[self.live[-1][1] - 1]) if self.live else -1

    def column(self, key: str) -> Floats:
        """All cells of a key, those of abandoned lines too; NaN for a key that no line has."""
        if self.num_rows == 0 or key not in self._columns:
            return np.full(self.num_rows, np.nan)
        return np.memmap(self._path(key), np.float64, mode="r", shape=(self.num_rows,))

    def live_column(self, key: str) -> Floats:
        """Cells of the lines that count."""
        return _pieces(self.column(key), self.live)

    def abandoned(self) -> list[tuple[int, int]]:
        """Rows [start, end) that do not count."""
        gaps, before = [], 0
        for start, end in [*self.live, (self.num_rows, self.num_rows)]:
            if start > before:
                gaps.append((before, start))
            before = end
        return gaps

    def _add_column(self, key: str, records: Sequence[Mapping[str, Any]]) -> None:
        if not any(_is_number(record.get(key)) for record in records):
            return
        if not self._columns:
            self._columns[OFFSET] = 0
            self._path(OFFSET).write_bytes(b"")
        self._columns[key] = len(self._columns)
        with self._path(key).open("wb") as file:
            file.write(np.full(self.num_rows, np.nan).tobytes())

    def _path(self, key: str) -> Path:
        # By number: a validation source may have any name.
        return self._directory / f"{self._kind}-{self._columns[key]}.f64"


def _pieces(cells: Floats, rows: list[tuple[int, int]]) -> Floats:
    if len(rows) == 1:
        return cells[rows[0][0] : rows[0][1]]
    return np.concatenate([cells[start:end] for start, end in rows]) if rows else cells[:0]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _numbers(cells: Sequence[Any]) -> Floats:
    try:
        return np.array(cells, np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([_number(cell) for cell in cells], np.float64)


def _number(cell: Any) -> float:
    try:
        return float(cell) if _is_number(cell) else math.nan
    except OverflowError:
        return math.inf
