"""Batches for training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity.core.batch import IGNORED_TARGET, Batch
from trinity.core.config import DataConfig
from trinity.data.build import Dataset, DocumentSet
from trinity.data.pack import RowPlanner, Span
from trinity.data.windows import RowWindows, read_excluded, without_documents


class Loader:
    """The training stream, seen from one process.

    The global sequence of rows is a pure function of (data fingerprint, seed, row number). Which
    rows a step trains on does not depend on the number of processes; which process reads which of
    them does.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        sequence_length: int,
        seed: int,
        rank: int,
        world_size: int,
        step_rows: Sequence[int] = (),
    ) -> None:
        """``step_rows`` are the numbers of rows that steps will ask for.

        Where all are multiples of the lanes, and the lanes one of ``world_size``, a process reads
        the rows of its own lanes and never plans another's: planning a row takes a tenth of a
        millisecond, which thousands of processes could not each do for all rows.
        """
        self._sets = [source.train for source in dataset.sources]
        self._names = [source.name for source in dataset.sources]
        self._rank, self._world_size = rank, world_size
        lengths = [documents.lengths for documents in self._sets]
        if config.exclude_documents is not None:
            counts = [len(own) for own in lengths]
            excluded = read_excluded(Path(config.exclude_documents), self._names, counts)
            lengths = without_documents(lengths, excluded)
        self.skipped = RowWindows(config.skip_rows)
        """Rows that are passed over."""
        self._planner = RowPlanner(
            lengths,
            [source.weight for source in dataset.sources],
            sequence_length=sequence_length,
            packing=config.packing,
            buffer_documents=config.buffer_documents,
            num_lanes=config.lanes,
            seed=seed,
        )
        per_rank, rest = divmod(config.lanes, world_size)
        divides = bool(step_rows) and not rest and not any(n % config.lanes for n in step_rows)
        self.own_lanes = range(rank * per_rank, (rank + 1) * per_rank) if divides else None
        """Lanes that only this process reads; None where rows are dealt out in blocks."""
        self.next_row = 0
        """Row of the global stream that comes next."""
        self._check_windows()

    def next_rows(self, num_rows: int) -> Batch:
        """This process's share of the next ``num_rows`` rows of the global stream.

        Those of its own lanes, or else the rank-th of world_size equal blocks. Raises ValueError
        when the rows cannot be divided equally.
        """
        share, rest = divmod(num_rows, self._world_size)
        if rest:
            raise ValueError(f"{num_rows} rows cannot be divided among {self._world_size} ranks")
        every, following = self.skipped.take(self.next_row, num_rows)
        if self.own_lanes is None:
            mine = every[self._rank * share : (self._rank + 1) * share]
        else:
            mine = [row for row in every if row % self._planner.num_lanes in self.own_lanes]
        batch = read_rows(self._sets, [self._planner.row(row) for row in mine])
        self.next_row = following
        return batch

    def skip_rows(self, first: int, end: int) -> None:
        """Never read the rows ``first .. end - 1``. Raises DataError where lanes forbid it."""
        self.skipped.add(first, end)
        self._check_windows()

    def rows_after(self, num_rows: int, count: int) -> list[int]:
        """The ``count`` rows that follow the first ``num_rows`` that are read."""
        return self.skipped.take(self.skipped.row_at(num_rows), count)[0]

    def _check_windows(self) -> None:
        if self.own_lanes is not None:
            self.skipped.check_lanes(self._planner.num_lanes)

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Where the stream stands, as int64 arrays of fixed shape.

        All but ``next_row`` have one row per lane: of :attr:`own_lanes`, or else of all lanes.
        """
        return {
            "next_row": np.array([self.next_row], dtype=np.int64),
            **self._planner.state(self.next_row, self.own_lanes),
        }

    def load_state(self, state: dict[str, np.ndarray[Any, Any]]) -> None:
        """Go on where a :meth:`state` was taken, under any number of processes."""
        self.next_row = int(state["next_row"][0])
        self._planner.load_state(state, self.own_lanes)

    def describe_rows(self, rows: Sequence[int]) -> list[str]:
        """One line per read of some global rows, in ascending order."""
        return [
            f"row {number}: {self._names[span.source]} document {span.document}, "
            f"tokens {span.start}..{span.start + span.length - 1}"
            for number in rows
            for span in self._planner.row(number)
        ]


def held_out_rows(
    dataset: Dataset, sequence_length: int, num_rows: int, *, batch_rows: int
) -> dict[str, list[Batch]]:
    """The same ``num_rows`` rows every time for each source that has held-out documents."""
    batches = {}
    for source in dataset.sources:
        if not source.held_out.lengths.any():
            continue
        planner = RowPlanner(
            [source.held_out.lengths],
            [1.0],
            sequence_length=sequence_length,
            packing="sequential",
            buffer_documents=1,
            num_lanes=1,
            seed=0,
        )
        rows = [planner.row(i) for i in range(num_rows)]
        batches[source.name] = [
            read_rows([source.held_out], rows[i : i + batch_rows])
            for i in range(0, num_rows, batch_rows)
        ]
    return batches


def read_rows(sets: Sequence[DocumentSet], rows: Sequence[Sequence[Span]]) -> Batch:
    """Fetch the tokens of planned rows."""
    sequence_length = sum(span.length for span in rows[0]) if rows else 0
    shape = (len(rows), sequence_length)
    tokens_BS = np.empty(shape, dtype=np.int64)
    targets_BS = np.full(shape, IGNORED_TARGET, dtype=np.int64)
    ids_BS = np.empty(shape, dtype=np.int32)
    for row, spans in enumerate(rows):
        position = 0
        for number, span in enumerate(spans):
            # One token more than the span, where the document has it: the last one's target.
            read = sets[span.source].read(span.document, span.start, span.length + 1)
            end = position + span.length
            tokens_BS[row, position:end] = read[: span.length]
            targets_BS[row, position : position + len(read) - 1] = read[1:]
            ids_BS[row, position:end] = number
            position = end
    return Batch(*(torch.from_numpy(array) for array in (tokens_BS, targets_BS, ids_BS)))
