"""One job at a time in a run directory, told apart from jobs that have died.

``RUN/lock/`` holds a file for each time the lock was taken, numbered. The highest number holds it.
Whoever finds that one released, or its holder dead, makes the file of the next number, with a hard
link, which exactly one of many can do on any file system, NFS included. The file of the highest
number is never removed, so that a slow starter cannot take a number that is past.

The holder touches its file every :data:`BEAT_S`. Its age is the difference to the time of a file
that was touched just now: both are given by the file server, no host's own clock is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from trinity.core import job
from trinity.core.errors import CheckpointError, ConfigError, TrainingError

LOCK_DIR = "lock"
BEAT_S = 15.0
STALE_S = 180.0
"""A holder that nothing else is known of counts as dead after this much silence: twelve beats.

Longer than a file server may be away without a fault (90 s of grace after an NFSv4 server
restarts) together with how long a client may show old times (60 s).
"""
WATCHED_BEATS = 2
"""Beats to wait for before a silent lock is taken over, so that a server's clock may jump."""
LINUX_PROCESSES = Path("/proc")


class RunLock:
    """The lock of one run directory, for the first process of a job; see :func:`held`."""

    def __init__(self, run_dir: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        """``beat_s``, ``stale_s``: see the constants; all jobs of a run must use the same."""
        self.directory = run_dir / LOCK_DIR
        self._beat_s, self._stale_s = beat_s, stale_s
        self._owner = {**_identity(), "token": uuid.uuid4().hex}
        self._own: Path | None = None
        self._closing = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, from a dead job if need be.

        Takes up to ``stale_s`` where the holder cannot be asked and is silent, less than two beats
        where it lives. Raises ConfigError, which says who holds the lock, when a living job does.
        """
        assert self._own is None
        candidate = self._candidate()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            candidate.write_text(json.dumps(self._owner) + "\n", encoding="utf-8")
            self._own = self._take(candidate)
        except OSError as error:
            raise ConfigError(
                f"{self.directory}: cannot lock the run: {error}; mend its permissions, or choose "
                "a directory on a file system with hard links"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                candidate.unlink(missing_ok=True)
        self._closing.clear()
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Let others have the lock. Says so in the file, whose number must not come back."""
        self._closing.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        own, self._own = self._own, None
        if own is not None and self._loss(own) is None:
            farewell = self._candidate()
            with contextlib.suppress(OSError):  # without it, as good as dead
                farewell.write_text(json.dumps({**self._owner, "released": True}), encoding="utf-8")
                os.replace(farewell, own)

    def loss(self) -> str | None:
        """Who took the lock away, or None while it is ours. Reads the directory, not memory."""
        return self._loss(self._own) if self._own is not None else "the lock was given back"

    def require(self) -> None:
        """Raise CheckpointError unless the lock is still ours; for before anything is published."""
        if (loss := self.loss()) is not None:
            raise CheckpointError(f"{self.directory.parent} is no longer ours: {loss}")

    def _candidate(self) -> Path:
        return self.directory / f"candidate-{self._owner['token']}"

    def _take(self, candidate: Path) -> Path:
        watch = _Watch(self._beat_s, self._stale_s)
        while True:
            number, latest = self._latest()
            if latest is not None and not watch.is_free(latest, candidate):
                time.sleep(min(1.0, self._beat_s / 4))
                continue
            wanted = self.directory / f"{number + 1:08d}"
            try:
                os.link(candidate, wanted)
            except FileExistsError:
                if _read(wanted).get("token") != self._owner["token"]:
                    continue  # another starter was faster; NFS may also repeat our own success
            # Of a number that is past, and whose file was removed since, the link says nothing.
            if self._latest()[0] != number + 1:
                wanted.unlink(missing_ok=True)
                continue
            for path in self.directory.glob("[0-9]*"):
                if (of := _number(path)) is not None and of <= number:
                    path.unlink(missing_ok=True)
            return wanted

    def _latest(self) -> tuple[int, Path | None]:
        found = {_number(path): path for path in self.directory.iterdir()}
        numbers = [number for number in found if number is not None]
        return (max(numbers), found[max(numbers)]) if numbers else (0, None)

    def _loss(self, own: Path) -> str | None:
        try:
            _, latest = self._latest()
            if latest == own and _read(own).get("token") == self._owner["token"]:
                return None
        except FileNotFoundError:
            latest = None
        except OSError:  # a file server that is away has given the lock to nobody
            return None
        return "its lock was removed" if latest is None else f"{_who(_read(latest))} took it over"

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_s):
            # A lock that was taken away is noticed by `loss`; the next beat makes up for a failure.
            with contextlib.suppress(OSError):
                if self._own is not None:
                    os.utime(self._own)


class _Watch:
    """What a starter sees of a lock that is taken, for as long as it looks."""

    def __init__(self, beat_s: float, stale_s: float) -> None:
        self._beat_s, self._stale_s = beat_s, stale_s
        self._seen: tuple[Path, float] | None = None
        self._since_s = 0.0

    def is_free(self, lock: Path, candidate: Path) -> bool:
        """Whether its holder released it or is dead; False while that cannot be said yet.

        Raises ConfigError when the holder lives.
        """
        try:
            owner, beat_s = _read(lock), _touched_s(lock)
        except FileNotFoundError:  # a newer one came
            return False
        fate = _fate(owner)
        if owner.get("released") or fate == "dead":
            return True
        if self._seen is None or self._seen[0] != lock:
            self._seen, self._since_s = (lock, beat_s), time.monotonic()
            if fate == "unknown":
                print(f"waiting to see whether {_who(owner)} still trains here", file=sys.stderr)
        if fate == "alive" or self._seen[1] != beat_s:
            raise ConfigError(_refusal(lock, owner))
        os.utime(candidate)
        age_s, watched_s = _touched_s(candidate) - beat_s, time.monotonic() - self._since_s
        # A server's clock that went back makes the age useless; the time watched never is.
        silent = age_s > self._stale_s and watched_s > WATCHED_BEATS * self._beat_s
        return silent or watched_s > self._stale_s


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[RunLock | None]:
    """Hold the lock of ``run_dir`` inside the ``with`` block; the first process's, None on others.

    Collective: every process of the job calls it. Creates the directory. Raises ConfigError, on
    every process, when another job holds the lock.
    """
    lock = RunLock(run_dir) if job.is_first() else None
    refusal = None
    try:
        if lock is not None:
            lock.acquire()
    except ConfigError as error:
        refusal = str(error)
    if (refusal := job.from_first(refusal)) is not None:
        raise ConfigError(refusal)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def require_held(lock: RunLock | None) -> None:
    """Raise TrainingError on every process when the first one's lock was taken away. Collective.

    For before a checkpoint is written: a job that was frozen, or cut off from the file server, for
    longer than :data:`STALE_S` finds another in its place.
    """
    loss = job.from_first(lock.loss() if lock is not None else None)
    if loss is not None:
        raise TrainingError(
            f"the run directory is no longer ours: {loss}; nothing more is written. See that only "
            "one job trains in it"
        )


def _identity() -> dict[str, Any]:
    """Who this process is, in terms that another process can check."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": _attempt(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _fate(owner: dict[str, Any]) -> str:
    """Whether a holder is "alive", "dead", or that is "unknown" from here."""
    if owner.get("machine") == _machine():
        return "alive" if _is_running(int(owner["pid"]), owner["born"]) else "dead"
    same_job = owner.get("job") and owner["job"] == os.environ.get("SLURM_JOB_ID")
    if same_job and owner["attempt"] < _attempt():
        return "dead"  # Slurm ends an attempt before it starts the next
    return "unknown"


def _attempt() -> int:
    """How often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _machine() -> str:
    """This start of this machine, and in which of its containers a process number means what."""
    try:
        boot = (LINUX_PROCESSES / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink(LINUX_PROCESSES / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_running(pid: int, born: float | None) -> bool:
    """Whether a process of this machine still is the one that was born then."""
    if not psutil.pid_exists(pid):
        return False
    found = _born(pid)
    return found is None or found == born


def _born(pid: int) -> float | None:
    """When a process started, by a clock that nobody sets; -1 for a zombie, None where hidden.

    psutil's own number moves with the wall clock on Linux.
    """
    try:
        text = (LINUX_PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        is_linux = (LINUX_PROCESSES / "self").exists()
        return None if is_linux else psutil.Process(pid).create_time()
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return -1.0 if fields[0] in "ZX" else float(fields[19])


def _read(lock: Path) -> dict[str, Any]:
    """What a lock says of its holder; nothing where that is not readable."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _touched_s(path: Path) -> float:
    """Time of modification, as the file server has it: NFS asks it anew when a file is opened."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _number(path: Path) -> int | None:
    return int(path.name) if re.fullmatch(r"[0-9]{8,}", path.name) else None


def _who(owner: dict[str, Any]) -> str:
    of_job = f" of Slurm job {owner['job']}" if owner.get("job") else ""
    return (
        f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{of_job}, "
        f"since {owner.get('since', '?')}"
    )


def _refusal(lock: Path, owner: dict[str, Any]) -> str:
    run_dir = lock.parent.parent
    return (
        f"{run_dir} is in use by {_who(owner)}; end that job first, or choose another directory. "
        f"If you are sure that it is dead, delete {lock.parent}"
    )
