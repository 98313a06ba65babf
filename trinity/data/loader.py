"""Batches for training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trinity.core.batch import IGNORED_TARGET, Batch
from trinity.core.config import DataConfig
from trinity.data.build import Dataset, DocumentSet
from trinity.data.pack import RowPlanner, Span
from trinity.data.row_stream import RowStream
from trinity.data.windows import read_excluded, without_documents


class Loader(RowStream[RowPlanner]):
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
        lengths = [documents.lengths for documents in self._sets]
        if config.exclude_documents is not None:
            counts = [len(own) for own in lengths]
            excluded = read_excluded(Path(config.exclude_documents), self._names, counts)
            lengths = without_documents(lengths, excluded)
        planner = RowPlanner(
            lengths,
            [source.weight for source in dataset.sources],
            sequence_length=sequence_length,
            packing=config.packing,
            buffer_documents=config.buffer_documents,
            num_lanes=config.lanes,
            seed=seed,
        )
        super().__init__(
            planner, config.skip_rows, rank=rank, world_size=world_size, step_rows=step_rows
        )

    def next_rows(self, num_rows: int) -> Batch:
        """This process's share of the next ``num_rows`` rows of the global stream.

        Those of its own lanes, or else the rank-th of world_size equal blocks. Raises ValueError
        when the rows cannot be divided equally.
        """
        return read_rows(self._sets, [self._planner.row(row) for row in self.take(num_rows)])

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
