"""A process beside a rank that ends it when no thread of its Python can run any more.

Standard library only: it is started by its path, in a few milliseconds, and takes little memory.
Its input is the number of seconds it may wait for the next number; the end of input ends it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

TICK_S = 1.0
ABORT_S = 10.0
"""For the stacks to be printed, which SIGABRT makes Python's faulthandler do."""


def watch(parent: int, *, tick_s: float = TICK_S) -> None:
    """Wait for numbers from ``parent``; when none comes in time, end it: SIGABRT, then SIGKILL.

    Time counts in ticks of this process, and only while the parent is not stopped: a job that is
    suspended and goes on is not ended.
    """
    limit_s, silent_s = float("inf"), 0.0
    while os.getppid() == parent:
        if select.select([0], [], [], tick_s)[0]:
            if not (text := os.read(0, 1 << 16)):
                return
            limit_s, silent_s = float(text.split()[-1]), 0.0
        elif not _is_stopped(parent):
            silent_s += tick_s
            if silent_s > limit_s:
                _end(parent, silent_s)
                return


def _end(parent: int, silent_s: float) -> None:
    text = f"process {parent}: no Python thread ran for {silent_s:.0f} s; ending it\n"
    os.write(2, text.encode())
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, signal.SIGABRT)
        time.sleep(ABORT_S)
        os.kill(parent, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether SIGSTOP, a debugger or Slurm holds a process; False where that is not told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in "Tt"


if __name__ == "__main__":
    watch(int(sys.argv[1]))
