"""Notices that training hangs, says where and because of which rank, and ends the process.

Every rank has a :class:`Watchdog`: a thread that the training loop tells what it is doing. When
that takes too long it prints the stacks of all threads, writes what collectives the rank has called
to ``RUN/flight-recorder/rank_N.json``, waits a moment for the other ranks to do the same, compares,
and ends the process with :data:`HANG_EXIT_CODE`, so that a launcher starts the job again. Should no
Python thread be able to run, a process beside it (:mod:`trinity.train.guard`) prints and ends.

    python -m trinity.train.watchdog RUN    # compare the files again, for instance on another day
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from trinity.core import job
from trinity.core.run_files import METRICS_FILE
from trinity.train import guard

HANG_EXIT_CODE = 124
"""Exit status of a process that hung: the one ``timeout`` uses, too."""
RECORDER_DIR = "flight-recorder"
RECORDER_DUMP = "_dump_fr_trace_json"
FIRST_STEP = 10.0
"""Times the limit of a step: kernels are compiled and memory is allocated, once."""
OTHER_WORK = 5.0
"""Times the limit of a step, for validating and for saving."""
GATHER_S = 10.0
"""The ranks of a hung job notice it within about a step of one another."""
DUMP_S = 60.0
"""For all that is done about a hang, file servers that do not answer included."""
TICK_S = 1.0


class _Work(NamedTuple):
    what: str
    step: int
    limit_s: float


class Watchdog:
    """Ends this process when what it does takes too long. Use it in a ``with``, on every rank.

    Time is counted in ticks of its own thread, at most two for each: after the whole process was
    stopped, or starved by a busy machine, nothing has passed that it could have used.
    """

    def __init__(self, run_dir: Path, hang_s: float) -> None:
        """``hang_s``: how long a step may take, seconds; 0 watches nothing."""
        self._run_dir, self._hang_s = run_dir, hang_s
        self._rank, self._world_size = job.rank(), job.world_size()
        self._work = _Work("start", 0, FIRST_STEP * hang_s)
        self._main_thread = threading.get_ident()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def doing(self, what: str, step: int, times: float = 1.0) -> None:
        """Say what is done from now on, which may take ``times`` the limit of a step.

        ``step`` counts finished ones. Cheap enough for every step; also a sign of progress.
        """
        self._work = _Work(what, step, times * self._hang_s)

    def __enter__(self) -> Self:
        """Start to watch; what an earlier attempt has left is kept under another name."""
        if not self._hang_s:
            return self
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)
        own = dump_path(self._run_dir, self._rank)
        with contextlib.suppress(OSError):
            os.replace(own, own.with_suffix(".previous.json"))
        self._guard = _start_guard()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()

    def _watch(self) -> None:
        tick_s = min(TICK_S, self._hang_s / 20)
        seen, passed_s, before_s = self._work, 0.0, time.monotonic()
        while not self._closing.wait(tick_s):
            now_s = time.monotonic()
            passed_s += min(now_s - before_s, 2 * tick_s)
            before_s = now_s
            if self._work is not seen:
                seen, passed_s = self._work, 0.0
            self._reassure(seen.limit_s)
            if passed_s > seen.limit_s:
                self._end(seen, passed_s)

    def _reassure(self, next_s: float) -> None:
        """Tell the guard that Python runs, and how long it may take to say so again."""
        if self._guard is None or self._guard.stdin is None:
            return
        try:
            os.write(self._guard.stdin.fileno(), f"{next_s}\n".encode())
        except BlockingIOError:  # the guard itself is stopped
            pass
        except OSError:
            _say("the guard beside this process has died; a hang of Python goes unnoticed")
            self._guard = None

    def _end(self, work: _Work, passed_s: float) -> None:
        self._reassure(DUMP_S)
        try:
            _say(
                f"rank {self._rank}: {work.what} took longer than {passed_s:.0f} s "
                f"(train.hang_s={self._hang_s:g}); where its threads are:"
            )
            faulthandler.dump_traceback(file=2, all_threads=True)
            self._dump(work)
            self._gather()
            if not any(dump_path(self._run_dir, r).exists() for r in range(self._rank)):
                text = "; ".join(diagnose(read_dumps(self._run_dir), self._world_size))
                _say(f"hang: {text}")
                if self._rank == 0:
                    _record(self._run_dir, work.step, text)
        except (OSError, ImportError, AttributeError, ValueError, KeyError, RuntimeError) as error:
            _say(f"rank {self._rank} could not say more: {type(error).__name__}: {error}")
        finally:
            # Not sys.exit: the main thread is stuck, and would be waited for.
            os._exit(HANG_EXIT_CODE)

    def _dump(self, work: _Work) -> None:
        """Write what this rank was doing, for the comparison."""
        stack = traceback.extract_stack(sys._current_frames().get(self._main_thread))
        frame = stack[-1] if stack else None
        record = {
            "rank": self._rank,
            "world_size": self._world_size,
            "host": socket.gethostname(),
            "doing": work.what,
            "where": f"{frame.filename}:{frame.lineno} in {frame.name}" if frame else "",
            "trace": _collectives(),
        }
        path = dump_path(self._run_dir, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        os.replace(temporary, path)

    def _gather(self) -> None:
        deadline_s = time.monotonic() + GATHER_S
        missing = set(range(self._world_size))
        while missing and time.monotonic() < deadline_s:
            missing = {r for r in missing if not dump_path(self._run_dir, r).exists()}
            time.sleep(0.1)


def dump_path(run_dir: Path, rank: int) -> Path:
    """Where a rank that hangs writes what it was doing."""
    return run_dir / RECORDER_DIR / f"rank_{rank}.json"


def read_dumps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What the ranks of a hung job have written, by rank; unreadable files are left out."""
    dumps = {}
    for path in (run_dir / RECORDER_DIR).glob("rank_*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if path == dump_path(run_dir, record["rank"]):  # not one of an earlier attempt
            dumps[record["rank"]] = record
    return dumps


def diagnose(dumps: Mapping[int, dict[str, Any]], world_size: int) -> list[str]:
    """Which ranks the others wait for, and where those are; the culprits first.

    In each process group the ranks call the same collectives in the same order. A rank whose last
    one has a lower number than another's lags behind; if it waits for nobody itself, the others
    wait for it. A rank that has written nothing is frozen, dead or out of touch.
    """
    silent = sorted(set(range(world_size)) - dumps.keys())
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for rank, dump in dumps.items():
        for entry in dump["trace"]:  # in order: the last one stays
            groups.setdefault(entry["group"], {})[rank] = entry
    behind, waiting = set(), set()
    lines = [_silent_line(rank) for rank in silent]
    mismatches = []
    for name, last in groups.items():
        top = max(entry["number"] for entry in last.values())
        behind |= {rank for rank, entry in last.items() if entry["number"] < top}
        waiting |= {rank for rank, entry in last.items() if not entry["done"]}
        front = {e["call"] for e in last.values() if e["number"] == top and not e["done"]}
        if len(front) > 1:
            mismatches.append(
                f"group {name}: call {top} differs between ranks: {', '.join(sorted(front))}"
            )
    culprits = sorted(behind - waiting) or ([] if silent else sorted(behind))
    lines += [_lag_line(rank, dumps[rank], groups) for rank in culprits]
    lines += mismatches
    if not lines:
        lines = [_lag_line(rank, dumps[rank], groups) for rank in sorted(dumps.keys() - waiting)]
    return lines or ["all ranks wait in the same collective: look at the network between them"]


def _silent_line(rank: int) -> str:
    return f"rank {rank} did not answer: frozen, dead, or cut off from the file system"


def _lag_line(
    rank: int, dump: Mapping[str, Any], groups: Mapping[str, Mapping[int, dict[str, Any]]]
) -> str:
    calls = [
        f"call {last[rank]['number']} of {max(e['number'] for e in last.values())} in group {name}"
        for name, last in groups.items()
        if rank in last and last[rank]["number"] < max(e["number"] for e in last.values())
    ]
    lag = f"lags behind ({', '.join(calls)})" if calls else "waits for no other rank"
    return f"rank {rank} on {dump['host']} {lag}: {dump['doing']}, at {dump['where']}"


def _collectives() -> list[dict[str, Any]]:
    """What torch's flight recorder holds of this process, oldest first."""
    if job.world_size() == 1:
        return []
    # Not public, but what torch's own tools use; needs TORCH_FR_BUFFER_SIZE in the environment.
    from torch._C import _distributed_c10d as c10d

    trace = json.loads(getattr(c10d, RECORDER_DUMP)(includeCollectives=True, onlyActive=False))
    return [
        {
            "group": " ".join(entry["process_group"]),
            "number": entry["collective_seq_id"],
            "call": f"{entry['profiling_name']} {entry['input_sizes']}",
            "done": bool(entry["retired"]) or entry["state"] == "completed",
            "created_ns": entry["time_created_ns"],
        }
        for entry in trace.get("entries", [])
        if not entry["is_p2p"]
    ]


def _record(run_dir: Path, step: int, text: str) -> None:
    """Append the event to the run's journal; a line that was being written stays torn."""
    event = {"kind": "event", "step": step, "time": time.time(), "event": "hang", "text": text}
    with (run_dir / METRICS_FILE).open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(f"{chr(10) if torn else ''}{json.dumps(event)}\n".encode())


def _start_guard() -> subprocess.Popen[bytes]:
    kept = ("PATH", "LD_LIBRARY_PATH")  # without RANK and the like: it is not one of the ranks
    started = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        env={name: os.environ[name] for name in kept if name in os.environ},
    )
    assert started.stdin is not None
    os.set_blocking(started.stdin.fileno(), False)
    return started


def _say(text: str) -> None:
    """Print without Python's locks and buffers, which the main thread may hold."""
    os.write(2, f"[watchdog] {text}\n".encode())


if __name__ == "__main__":
    found = read_dumps(Path(sys.argv[1]))
    size = max((record["world_size"] for record in found.values()), default=0)
    print("\n".join(diagnose(found, size)) if found else "no rank of this run has hung")
