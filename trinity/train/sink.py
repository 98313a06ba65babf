"""A file of lines that training outlives: on a full disk the lines wait in memory."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections import deque
from pathlib import Path

RETRY_S = 30.0
MAX_WAITING = 100_000
"""Lines kept while the file cannot be written, some 100 MB; the oldest are dropped beyond."""


class LineSink:
    """Appends whole lines to a file, each with one write.

    When that fails, for instance on a full disk, what was written of the line is taken back, a
    warning is given, and the lines wait in memory; writing is tried again every
    :data:`RETRY_S`. So the file never holds a torn line, except after a crash of the machine.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending; raises OSError."""
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._failed_s: float | None = None

    def write(self, line: str) -> None:
        """Append ``line`` and a newline, now or later."""
        self._waiting.append(line.encode() + b"\n")
        if self._failed_s is None or time.monotonic() - self._failed_s >= RETRY_S:
            self._flush()

    def close(self) -> None:
        """Try once more, then close."""
        self._flush()
        if self._waiting:
            warnings.warn(f"{self.path}: {len(self._waiting)} lines were lost", stacklevel=2)
        self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            try:
                self._append(self._waiting[0])
            except OSError as error:
                if self._failed_s is None:
                    warnings.warn(
                        f"{self.path}: cannot write: {error}; free space. Training goes on, lines "
                        f"wait in memory and are tried again every {RETRY_S:.0f} s",
                        stacklevel=3,
                    )
                self._failed_s = time.monotonic()
                return
            self._waiting.popleft()
        self._failed_s = None

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):  # a disk that has just become full
                raise OSError("only a part of a line could be written")
        except OSError:
            with contextlib.suppress(OSError):  # a device or a pipe
                os.ftruncate(self._file.fileno(), end)
            raise
