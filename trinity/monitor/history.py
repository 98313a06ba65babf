"""What a run has recorded so far, kept up to date while it writes.

Each byte of ``metrics.jsonl`` is parsed once: numbers go to columns on disk, lists to bands, events
to a list. The result is kept in a cache directory, so that a page opens at once the next time.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trinity.monitor.bands import Band
from trinity.monitor.columns import OFFSET, Table
from trinity.monitor.loads import BANDS, LAYER_LOAD, LAYER_RANGE_LOAD, load_bands

KINDS = ("train", "instruments", "validation", "checkpoint")
LISTS = (
    "max_vio",
    "bias_norm_layers",
    "router_logit_rms_layers",
    "attention_logit_max_layers",
    "rank_ms",
)
PIECE_BYTES = 2 << 20
"""A page waits at most for what a piece adds to the columns: some 50 ms."""
SAVE_EVERY_BYTES = 64 << 20
"""A cache that is behind by this much costs its reader about a second."""
FINGERPRINT_BYTES = 512
MAX_EVENTS = 20_000
STATE_VERSION = 1
Record = dict[str, Any]


class History:
    """One run's record. Safe to read from one thread while another calls :meth:`catch_up`."""

    def __init__(self, metrics: Path, cache: Path) -> None:
        """``cache`` is a directory that belongs to this object alone."""
        self.metrics = metrics
        self.lock = threading.RLock()
        """Hold it while using the tables: a rewritten file empties them."""
        self.generation = 0
        """Counts how often all was read anew; what was read before is void then."""
        self.num_damaged = 0
        """Lines that are no record, such as one torn by a crash."""
        self._cache = cache
        self._loads = _json_reader()
        self._clear()
        self._restore()

    @property
    def progress(self) -> float:
        """Share of the file that is parsed, 0 to 1."""
        return 1.0 if not self._size else min(1.0, self._offset / self._size)

    @property
    def num_ranges(self) -> int:
        """Ranges of noise levels whose loads are told apart; 0 of a run on text."""
        of_ranges = self.bands.get(LAYER_RANGE_LOAD)
        return of_ranges.width // self.bands[LAYER_LOAD].width if of_ranges is not None else 0

    def catch_up(self, max_bytes: int = PIECE_BYTES) -> bool:
        """Parse up to ``max_bytes`` that are new. True when there may be more at once.

        A file that is gone changes nothing: what was read stays.

        Raises:
            OSError: the file cannot be read, or the cache cannot be written. May be called again.
        """
        try:
            file = self.metrics.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return False
        with file:
            return self._read(file, max_bytes)

    def save(self) -> None:
        """Write the cache's state, so that another process continues from here.

        Raises:
            OSError: no space.
        """
        with self.lock:
            name = f"bands-{self._offset}.npz"
            arrays = {
                f"{key}:{part}": array
                for key, band in self.bands.items()
                for part, array in band.state().items()
            }
            with (self._cache / name).open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            state = {
                "version": STATE_VERSION,
                "offset": self._offset,
                "size": self._size,
                "inode": self._inode,
                "fingerprint": self._fingerprint,
                "num_damaged": self.num_damaged,
                "bands": name,
                "load_shape": self.load_shape,
                "tables": {kind: table.state() for kind, table in self.tables.items()},
                "events": self.events,
            }
            temporary = self._cache / "state.tmp"
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self._cache / "state.json")
            for old in self._cache.glob("bands-*.npz"):
                if old.name != name:
                    old.unlink(missing_ok=True)
            self._saved_offset = self._offset

    def records_at(self, steps: tuple[int, int], most: int) -> list[Record]:
        """Up to ``most`` train lines between two steps, read from the file again, evenly spread.

        For what bands cannot tell: exact lists of a short window. Lines of a file that has been
        rewritten meanwhile are left out.
        """
        with self.lock:
            table = self.tables["train"]
            rows, offsets = table.live_column("step"), table.live_column(OFFSET)
            low, high = np.searchsorted(rows, steps[0]), np.searchsorted(rows, steps[1], "right")
            picked = np.unique(np.linspace(low, max(low, high - 1), most).astype(int))
            places = [(int(rows[i]), int(offsets[i])) for i in picked if i < high]
        found = []
        try:
            with self.metrics.open("rb") as file:
                for step, offset in places:
                    file.seek(offset)
                    record = self._record(file.readline())
                    if record is not None and record["step"] == step:
                        found.append(record)
        except OSError:
            return []
        return found

    def _clear(self) -> None:
        self._offset = self._saved_offset = self._inode = self._size = self._fingerprint = 0
        self.num_damaged = 0
        self.tables = {kind: Table(self._cache, kind) for kind in KINDS}
        self.bands: dict[str, Band] = {}
        self.load_shape: tuple[int, int] | None = None
        self.events: list[Record] = []
        """The last of them, ``MAX_EVENTS`` at most."""
        self.num_events = 0

    def _restore(self) -> None:
        try:
            state = json.loads((self._cache / "state.json").read_text(encoding="utf-8"))
            if state["version"] != STATE_VERSION:
                return
            with np.load(self._cache / state["bands"], allow_pickle=False) as arrays:
                parts: dict[str, dict[str, Any]] = {}
                for name in arrays.files:
                    key, part = name.rsplit(":", 1)
                    parts.setdefault(key, {})[part] = arrays[name]
            self.tables = {kind: Table(self._cache, kind, state["tables"][kind]) for kind in KINDS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self._clear()  # none yet, or damaged: everything is parsed again
            return
        self.bands = {key: Band.from_state(arrays) for key, arrays in parts.items()}
        self.load_shape = tuple(state["load_shape"]) if state["load_shape"] else None
        self._offset = self._saved_offset = state["offset"]
        self._size, self._inode = state["size"], state["inode"]
        self._fingerprint, self.num_damaged = state["fingerprint"], state["num_damaged"]
        self.events = state["events"]
        self.num_events = len(self.events)

    def _read(self, file: BinaryIO, max_bytes: int) -> bool:
        status = os.fstat(file.fileno())
        if self._is_rewritten(file, status):
            with self.lock:
                self._clear()
                self.generation += 1
        self._inode, self._size = status.st_ino, status.st_size
        file.seek(self._offset)
        block = file.read(max_bytes)
        if len(block) == max_bytes:
            block += file.readline()
        end = block.rfind(b"\n") + 1  # what follows is being written, or torn
        if end == 0:
            return False
        found = self._parse(block[:end])
        with self.lock:
            self._take(found)
            self._offset += end
        self._fingerprint = _fingerprint(file, self._offset)
        is_first = self._saved_offset == 0
        if is_first or self._offset - self._saved_offset >= SAVE_EVERY_BYTES:
            self.save()
        return len(block) >= max_bytes

    def _is_rewritten(self, file: BinaryIO, status: os.stat_result) -> bool:
        if self._offset == 0:
            return False
        if status.st_ino != self._inode or status.st_size < self._offset:
            return True
        # A file system may give the number of the old file to the new one.
        return _fingerprint(file, self._offset) != self._fingerprint

    def _record(self, line: bytes) -> Record | None:
        try:
            record = self._loads(line)
        except ValueError:
            try:
                record = json.loads(line)  # knows NaN and Infinity, and is slower
            except ValueError:
                return None
        known = isinstance(record, dict) and isinstance(record.get("kind"), str)
        return record if known and isinstance(record.get("step"), int) else None

    def _parse(self, block: bytes) -> list[tuple[int, Record]]:
        """Records with their places in the file."""
        found, place = [], self._offset
        for line in block.split(b"\n"):
            at, place = place, place + len(line) + 1
            record = self._record(line) if line else None
            if record is not None:
                found.append((at, record))
            else:
                self.num_damaged += bool(line)
        return found

    def _take(self, found: list[tuple[int, Record]]) -> None:
        pending: dict[str, list[Record]] = {kind: [] for kind in KINDS}
        places: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for at, record in found:
            kind, step = record["kind"], record["step"]
            if kind == "event":
                self._take_event(record, pending, places)
            elif kind in pending:
                rows = pending[kind]
                last = rows[-1]["step"] if rows else self.tables[kind].last_step
                if step <= last:
                    self._abandon((kind,), step, pending, places)
                pending[kind].append(record)
                places[kind].append(at)
        self._flush(KINDS, pending, places)

    def _take_event(
        self, record: Record, pending: dict[str, list[Record]], places: dict[str, list[int]]
    ) -> None:
        self.events.append(record)
        self.num_events += 1
        del self.events[:-MAX_EVENTS]
        if record.get("event") == "rewind" and isinstance(record.get("to_step"), int):
            self._abandon(KINDS, record["to_step"] + 1, pending, places)

    def _abandon(
        self,
        kinds: tuple[str, ...],
        step: int,
        pending: dict[str, list[Record]],
        places: dict[str, list[int]],
    ) -> None:
        self._flush(kinds, pending, places)
        for kind in kinds:
            self.tables[kind].abandon(step)
        for key, band in self.bands.items():
            if _kind_of(key) in kinds:
                band.abandon(step)

    def _flush(
        self,
        kinds: tuple[str, ...],
        pending: dict[str, list[Record]],
        places: dict[str, list[int]],
    ) -> None:
        for kind in kinds:
            rows = pending[kind]
            self.tables[kind].append(rows, places[kind])
            self._flush_lists(rows)
            pending[kind], places[kind] = [], []

    def _flush_lists(self, rows: list[Record]) -> None:
        for key in LISTS:
            held = [row for row in rows if isinstance(row.get(key), list) and row[key]]
            for group in _equal_lengths(held, key):
                steps = np.array([row["step"] for row in group], np.int64)
                values = _matrix([row[key] for row in group])
                if values is None:
                    continue
                if key not in self.bands:
                    self.bands[key] = Band(values.shape[1])
                self.bands[key].add(steps, values)
        self.load_shape = load_bands(rows, self.bands) or self.load_shape


def _kind_of(key: str) -> str:
    return "train" if key in ("max_vio", *BANDS, *BANDS.values()) else "instruments"


def _equal_lengths(rows: list[Record], key: str) -> list[list[Record]]:
    groups: list[list[Record]] = []
    for row in rows:
        if groups and len(groups[-1][-1][key]) == len(row[key]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _matrix(lists: list[Any]) -> NDArray[np.float32] | None:
    try:
        values = np.array(lists, np.float32)
    except (TypeError, ValueError):
        return None
    return values if values.ndim == 2 else None


def _fingerprint(file: BinaryIO, offset: int) -> int:
    start = max(0, offset - FINGERPRINT_BYTES)
    file.seek(start)
    return zlib.crc32(file.read(offset - start))


def _json_reader() -> Callable[[bytes], Any]:
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads
