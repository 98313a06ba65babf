"""Which rows of a global stream a process reads, whatever the rows hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from trinity.data.windows import RowWindows

State = dict[str, np.ndarray[Any, Any]]
"""int64 arrays of fixed shape."""


class Planner(Protocol):
    """What every row of a stream holds; row r belongs to lane r mod lanes."""

    @property
    def num_lanes(self) -> int:
        """Independent row streams."""
        ...

    def state(self, next_row: int, lanes: range | None = None) -> State:
        """Everything needed to go on at ``next_row``, with one row per lane of ``lanes``."""
        ...

    def load_state(self, state: State, lanes: range | None = None) -> None:
        """Go to a :meth:`state` of the same lanes."""
        ...


PlannerT = TypeVar("PlannerT", bound=Planner)


class RowStream(Generic[PlannerT]):
    """The training stream, seen from one process.

    Which rows a step trains on does not depend on the number of processes; which process reads
    which of them does.
    """

    TABLE: ClassVar[str] = "data"
    """Of the configuration, where the stream is described."""

    def __init__(
        self,
        planner: PlannerT,
        skip_rows: Iterable[tuple[int, int]],
        *,
        rank: int,
        world_size: int,
        step_rows: Sequence[int] = (),
    ) -> None:
        """``step_rows`` are the numbers of rows that steps will ask for.

        Where all are multiples of the lanes, and the lanes one of ``world_size``, a process reads
        the rows of its own lanes and never plans another's.
        """
        self._planner = planner
        self._rank, self._world_size = rank, world_size
        self.skipped = RowWindows(skip_rows)
        """Rows that are passed over."""
        lanes = planner.num_lanes
        per_rank, rest = divmod(lanes, world_size)
        divides = bool(step_rows) and not rest and not any(n % lanes for n in step_rows)
        self.own_lanes = range(rank * per_rank, (rank + 1) * per_rank) if divides else None
        """Lanes that only this process reads; None where rows are dealt out in blocks."""
        self.next_row = 0
        """Row of the global stream that comes next."""
        self._check_windows()

    def take(self, num_rows: int) -> list[int]:
        """This process's share of the next ``num_rows`` rows of the global stream.

        Those of its own lanes, or else the rank-th of world_size equal blocks. Raises ValueError
        when the rows cannot be divided equally.
        """
        share, rest = divmod(num_rows, self._world_size)
        if rest:
            raise ValueError(f"{num_rows} rows cannot be divided among {self._world_size} ranks")
        every, self.next_row = self.skipped.take(self.next_row, num_rows)
        if self.own_lanes is None:
            return every[self._rank * share : (self._rank + 1) * share]
        lanes = self._planner.num_lanes
        return [row for row in every if row % lanes in self.own_lanes]

    def skip_rows(self, first: int, end: int) -> None:
        """Never read the rows ``first .. end - 1``. Raises DataError where lanes forbid it."""
        self.skipped.add(first, end)
        self._check_windows()

    def rows_after(self, num_rows: int, count: int) -> list[int]:
        """The ``count`` rows that follow the first ``num_rows`` that are read."""
        return self.skipped.take(self.skipped.row_at(num_rows), count)[0]

    def _check_windows(self) -> None:
        if self.own_lanes is not None:
            self.skipped.check_lanes(self._planner.num_lanes, table=self.TABLE)

    def state(self) -> State:
        """Where the stream stands, as int64 arrays of fixed shape.

        All but ``next_row`` have one row per lane: of :attr:`own_lanes`, or else of all lanes.
        """
        return {
            "next_row": np.array([self.next_row], dtype=np.int64),
            **self._planner.state(self.next_row, self.own_lanes),
        }

    def load_state(self, state: State) -> None:
        """Go on where a :meth:`state` was taken, under any number of processes."""
        self.next_row = int(state["next_row"][0])
        self._planner.load_state(state, self.own_lanes)
