"""Which documents fill which row: a pure function of (data, seed, row number).

The stream of rows is dealt to a fixed number of *lanes*: row r belongs to lane r mod lanes. A lane
draws documents and packs them by itself, so neither the number of processes nor that of workers
can change what a row holds, and a process only replays the lanes whose rows it reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MASK64 = (1 << 64) - 1
FEISTEL_ROUNDS = 4


class Span(NamedTuple):
    """One contiguous read of a document inside a row."""

    source: int
    document: int
    start: int
    """First token, within the document."""
    length: int
    """Tokens read."""


def mix64(value: int) -> int:
    """A 64-bit hash of an integer (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def stream_key(*parts: object) -> int:
    """A 64-bit key for an independent random stream, from anything printable."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def permuted(position: int, size: int, key: int) -> int:
    """Where ``position`` goes under a pseudo-random permutation of 0..size-1.

    A Feistel network on the next even number of bits, walked until it lands inside: a bijection
    without a table, for any size.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for i in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (right << 8 | i)) & mask)
        position = left << half_bits | right
        if position < size:
            return position


class DocumentStream:
    """The documents one lane draws, source by source in exact proportion to the weights.

    The source that lags most behind its share of tokens is next. Within a source all lanes
    together walk through a fresh permutation every epoch, so each document comes exactly once per
    epoch.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray[Any, Any]],
        weights: Sequence[float],
        *,
        seed: int,
        lane: int,
        num_lanes: int,
    ) -> None:
        self._lengths, self._weights = lengths, weights
        self._lane, self._num_lanes, self._seed = lane, num_lanes, seed
        self._keys: dict[tuple[int, int], int] = {}
        self.num_drawn = [0] * len(lengths)
        """Documents drawn from each source."""
        self.num_tokens = [0] * len(lengths)
        """Tokens drawn from each source."""

    def draw(self) -> tuple[int, int, int]:
        """(source, document, its length) of the next document that is not empty."""
        while True:
            source = min(
                range(len(self._weights)), key=lambda s: (self.num_tokens[s] / self._weights[s], s)
            )
            size = len(self._lengths[source])
            draw = self.num_drawn[source] * self._num_lanes + self._lane
            epoch, position = divmod(draw, size)
            document = permuted(position, size, self._key(source, epoch))
            length = int(self._lengths[source][document])
            self.num_drawn[source] += 1
            self.num_tokens[source] += length
            if length > 0:
                return source, document, length

    def _key(self, source: int, epoch: int) -> int:
        if (source, epoch) not in self._keys:
            self._keys[source, epoch] = stream_key("documents", self._seed, source, epoch)
        return self._keys[source, epoch]


class Lane:
    """Packs one lane's documents into rows.

    With ``capacity`` N this is the random sequential document buffer (Trinity report, section
    3.2): whenever only N documents are open, new ones are opened up to 2 N; each read takes a
    random open document from where it stands to its end or the end of the row. Nothing is dropped
    and nothing is cut in advance. With ``capacity`` 0 documents follow one another in sequence.
    """

    def __init__(self, stream: DocumentStream, *, capacity: int, seed: int, lane: int) -> None:
        self.stream = stream
        self.capacity = capacity
        self._key = stream_key("picks", seed, lane)
        self.num_picks = 0
        self.num_rows = 0
        self.open: list[list[int]] = []
        """[source, document, length, head] of every open document."""

    def next_row(self, num_tokens: int) -> list[Span]:
        """The spans of the lane's next row, ``num_tokens`` together."""
        spans = []
        remaining = num_tokens
        while remaining:
            self._refill()
            number = self._pick()
            entry = self.open[number]
            source, document, length, head = entry
            taken = min(remaining, length - head)
            spans.append(Span(source, document, head, taken))
            remaining -= taken
            entry[3] = head + taken
            if entry[3] == length:
                # Swap with the last: removal in constant time, and the order stays a pure
                # function of the picks.
                self.open[number] = self.open[-1]
                self.open.pop()
        self.num_rows += 1
        return spans

    def _refill(self) -> None:
        if len(self.open) <= self.capacity:
            while len(self.open) < max(1, 2 * self.capacity):
                source, document, length = self.stream.draw()
                self.open.append([source, document, length, 0])

    def _pick(self) -> int:
        if self.capacity == 0:
            return 0
        self.num_picks += 1
        return (mix64(self._key ^ self.num_picks) * len(self.open)) >> 64


class RowPlanner:
    """All lanes together: the spans of any row, in any order that does not go back in a lane."""

    def __init__(
        self,
        lengths: Sequence[np.ndarray[Any, Any]],
        weights: Sequence[float],
        *,
        sequence_length: int,
        packing: str,
        buffer_documents: int,
        num_lanes: int,
        seed: int,
    ) -> None:
        self.sequence_length = sequence_length
        self.capacity = buffer_documents // num_lanes if packing == "rsdb" else 0
        self.lanes = [
            Lane(
                DocumentStream(lengths, weights, seed=seed, lane=lane, num_lanes=num_lanes),
                capacity=self.capacity,
                seed=seed,
                lane=lane,
            )
            for lane in range(num_lanes)
        ]

    def row(self, number: int) -> list[Span]:
        """Spans of row ``number``; rows of the same lane that were passed over are replayed."""
        index, lane_number = divmod(number, len(self.lanes))
        lane = self.lanes[lane_number]
        if index < lane.num_rows:
            raise ValueError(f"row {number} was planned already; load an earlier state to go back")
        self._replay(lane, index)
        return lane.next_row(self.sequence_length)

    @property
    def num_lanes(self) -> int:
        """Independent row streams; row r belongs to lane r mod lanes."""
        return len(self.lanes)

    def state(self, next_row: int, lanes: range | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Everything needed to go on at ``next_row``, as int64 arrays of fixed shape.

        One row for each of ``lanes``, or of all.
        """
        numbers = range(self.num_lanes) if lanes is None else lanes
        chosen = [self.lanes[number] for number in numbers]
        for number, lane in zip(numbers, chosen, strict=True):
            self._replay(lane, (next_row - number + self.num_lanes - 1) // self.num_lanes)
        open_documents = np.full((len(chosen), max(1, 2 * self.capacity), 4), -1, dtype=np.int64)
        for index, lane in enumerate(chosen):
            if lane.open:
                open_documents[index, : len(lane.open)] = lane.open
        return {
            "open_documents": open_documents,
            "num_picks": np.array([lane.num_picks for lane in chosen], dtype=np.int64),
            "num_rows": np.array([lane.num_rows for lane in chosen], dtype=np.int64),
            "num_drawn": np.array([lane.stream.num_drawn for lane in chosen], dtype=np.int64),
            "num_tokens": np.array([lane.stream.num_tokens for lane in chosen], dtype=np.int64),
        }

    def load_state(
        self, state: dict[str, np.ndarray[Any, Any]], lanes: range | None = None
    ) -> None:
        """Go back, or forward, to a :meth:`state` of the same lanes."""
        chosen = self.lanes if lanes is None else [self.lanes[number] for number in lanes]
        for number, lane in enumerate(chosen):
            rows = state["open_documents"][number]
            lane.open = [[int(v) for v in row] for row in rows if row[0] >= 0]
            lane.num_picks = int(state["num_picks"][number])
            lane.num_rows = int(state["num_rows"][number])
            lane.stream.num_drawn = state["num_drawn"][number].tolist()
            lane.stream.num_tokens = state["num_tokens"][number].tolist()

    def _replay(self, lane: Lane, num_rows: int) -> None:
        while lane.num_rows < num_rows:
            lane.next_row(self.sequence_length)
