"""Rows of the data stream that are never trained on, and documents that are never opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trinity.core.errors import DataError


class RowWindows:
    """Disjoint windows [first, end) of rows that the stream passes over."""

    def __init__(self, windows: Iterable[tuple[int, int]] = ()) -> None:
        self.windows: list[tuple[int, int]] = []
        """In order; none touches another."""
        for first, end in windows:
            self.add(first, end)

    def add(self, first: int, end: int) -> None:
        """Pass over ``first .. end - 1`` too."""
        assert 0 <= first < end
        apart = [w for w in self.windows if w[1] < first or w[0] > end]
        joined = [w for w in self.windows if w not in apart] + [(first, end)]
        both = (min(w[0] for w in joined), max(w[1] for w in joined))
        self.windows = sorted([*apart, both])

    def take(self, next_row: int, num_rows: int) -> tuple[list[int], int]:
        """The next ``num_rows`` rows from ``next_row`` on, and the row that follows the last."""
        rows: list[int] = []
        for first, end in [*self.windows, (None, None)]:
            missing = num_rows - len(rows)
            stop = next_row + missing if first is None else min(first, next_row + missing)
            rows.extend(range(next_row, stop))
            if len(rows) == num_rows:
                break
            assert end is not None
            next_row = max(next_row, end)
        return rows, rows[-1] + 1 if rows else next_row

    def row_at(self, count: int) -> int:
        """The row that is read after ``count`` others."""
        row = count
        for first, end in self.windows:
            if row >= first:
                row += end - first
        return row

    def check_lanes(self, num_lanes: int, *, table: str) -> None:
        """Raise DataError unless every window leaves out whole rounds of the lanes.

        Where each process reads its own lanes, anything else would give them unequal numbers.
        ``table`` is where the lanes are configured.
        """
        for first, end in self.windows:
            if first % num_lanes or end % num_lanes:
                raise DataError(
                    f"rows {first}..{end - 1} are to be skipped, but each process reads lanes of "
                    f"its own: both ends must be multiples of {table}.lanes={num_lanes}"
                )


def without_documents(
    lengths: Sequence[np.ndarray[Any, Any]], excluded: Mapping[int, Iterable[int]]
) -> list[np.ndarray[Any, Any]]:
    """Documents' lengths by source, zero for the excluded ones: what is empty is never opened."""
    result = list(lengths)
    for source, documents in excluded.items():
        result[source] = result[source].copy()
        result[source][list(documents)] = 0
        if not result[source].any():
            raise DataError("data.exclude_documents leaves a source without a document; drop it")
    return result


def read_excluded(
    path: Path, names: Sequence[str], num_documents: Sequence[int]
) -> dict[int, list[int]]:
    """Numbers of the documents in a list, by number of the source.

    A line holds a source's name and a document's number, perhaps with the word "document" between,
    as ``trinity data show-step`` prints them; what follows is a remark, and so is a line that
    starts with #. Raises DataError for a line that names nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude_documents: cannot read {path}: {error}") from None
    excluded: dict[int, list[int]] = {}
    for number, line in enumerate(lines, 1):
        words = [word.rstrip(",") for word in line.split() if word != "document"]
        if not words or words[0].startswith("#"):
            continue
        where = f"data.exclude_documents: {path}, line {number}"
        if words[0] not in names or len(words) < 2 or not words[1].isdecimal():
            raise DataError(
                f'{where}: {line!r} is no "source number"; sources are {", ".join(names)}'
            )
        source, document = names.index(words[0]), int(words[1])
        if document >= num_documents[source]:
            raise DataError(
                f"{where}: {words[0]} has {num_documents[source]} documents, numbered from 0"
            )
        excluded.setdefault(source, []).append(document)
    return excluded
