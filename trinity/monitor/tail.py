"""Reads a run's ``metrics.jsonl`` while the trainer still writes it: only what is new, only lines
that are complete.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

CHUNK_BYTES = 2**24
"""Read at a time, so that a long record never has to fit into memory."""
MAX_LINE_BYTES = 2**26
"""No record is as long; a line beyond it is damage and is skipped."""
MARK_BYTES = 256


class Position(NamedTuple):
    """How far a file was read; plain values, so that it can be kept on disk."""

    inode: int = 0
    offset: int = 0
    mark: str = ""
    """The bytes before ``offset``, hexadecimal, to recognise the file again."""


class Chunk(NamedTuple):
    """What :meth:`JsonLinesTail.read` found."""

    lines: list[bytes]
    restarted: bool
    """The file is another one than before: the lines are its first, and what was read earlier may
    no longer hold."""
    more: bool
    """The end of the file was not reached: call again."""


class JsonLinesTail:
    """Follows one file of JSON lines. Not thread-safe; holds no open file between calls.

    A line without its newline is left for the next call. A file that was replaced (a resumed run
    rewrites its record without the lines beyond the resumed step) or cut is read from its
    beginning. A file that is absent reads as empty.
    """

    def __init__(self, path: Path, position: Position | None = None) -> None:
        """``position`` continues where another reader of the same file stopped."""
        self.path = path
        self.position = position or Position()
        self.num_bad_lines = 0
        """Lines skipped so far because they are no records."""
        self._in_damage = False

    def read(self, chunk_bytes: int = CHUNK_BYTES) -> Chunk:
        """The next complete lines, without newlines, about ``chunk_bytes`` at most.

        Raises OSError when the file is there and cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return Chunk([], restarted=False, more=False)
        with file:
            restarted = self._find_place(file)
            data = file.read(chunk_bytes)
            full = len(data) == chunk_bytes
            while full and b"\n" not in data[-chunk_bytes:] and len(data) < MAX_LINE_BYTES:
                added = file.read(chunk_bytes)
                data += added
                full = len(added) == chunk_bytes
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) >= MAX_LINE_BYTES:
            self.num_bad_lines += not self._in_damage
            self._in_damage = True
            self._advance(data)
            return Chunk([], restarted, more=True)
        lines = data[:end].split(b"\n")[:-1]
        if lines and self._in_damage:
            del lines[0]  # the end of a line that was too long
            self._in_damage = False
        self._advance(data[:end])
        return Chunk(lines, restarted, more=full)

    def parse(self, line: bytes) -> dict[str, Any] | None:
        """A line's record; None, counted in ``num_bad_lines``, when it is none."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if (
            isinstance(record, dict)
            and isinstance(record.get("kind"), str)
            and type(record.get("step")) is int
        ):
            return record
        self.num_bad_lines += 1
        return None

    def _find_place(self, file: Any) -> bool:
        """Seek to where reading goes on; True when that is the beginning of another file."""
        inode, offset, mark = self.position
        expected = bytes.fromhex(mark)
        found = None
        now = _inode(file)
        if now == inode:
            file.seek(offset - len(expected))
            found = file.read(len(expected))
        if found == expected:
            return False
        self.position = Position(inode=now)
        self._in_damage = False
        file.seek(0)
        return offset > 0

    def _advance(self, data: bytes) -> None:
        inode, offset, mark = self.position
        tail = (bytes.fromhex(mark) + data[-MARK_BYTES:])[-MARK_BYTES:]
        self.position = Position(inode, offset + len(data), tail.hex())


def _inode(file: Any) -> int:
    return os.fstat(file.fileno()).st_ino
