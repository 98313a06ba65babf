"""All runs below a directory, with their histories kept up to date by one thread."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from trinity.core.run_files import METRICS_FILE
from trinity.monitor.catalog import RunState, find_runs, run_state
from trinity.monitor.history import History

POLL_S = 1.0
BREATH_S = 0.01
"""Between two pieces of a long file, so that pages are answered meanwhile."""
MAX_READERS = 16


class Library:
    """What the pages of a server share. Histories are made for runs that a page has asked for."""

    def __init__(self, directory: Path, cache: Path | None = None) -> None:
        """``cache``: default ``$XDG_CACHE_HOME/trinity/monitor``."""
        self.directory = directory
        self.states: dict[str, RunState] = {}
        self.problems: dict[Path, str] = {}
        """By directory of a run: why its record cannot be followed."""
        self._cache = cache or default_cache()
        self._histories: dict[Path, History] = {}
        self._locks: list[Any] = []
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.look()

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread = threading.Thread(target=self._follow, name="histories", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread and save the caches."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        for history in self._histories.values():
            try:
                history.save()
            except OSError:
                continue  # only speed is lost, and there is nobody to tell
        for lock in self._locks:
            lock.close()

    def look(self) -> None:
        """See which runs there are and how they are doing."""
        self.states = {
            name: run_state(name, path) for name, path in find_runs(self.directory).items()
        }

    def history(self, name: str) -> History | None:
        """The history of a run, empty at first; None for a run that is not there."""
        state = self.states.get(name)
        if state is None:
            return None
        path = state.path.resolve()
        if path not in self._histories:
            self._histories[path] = History(state.path / METRICS_FILE, self._private_cache(path))
            self._wake.set()
        return self._histories[path]

    def read_all(self, names: Iterable[str]) -> None:
        """Parse all that the named runs have written; for use without the thread.

        Raises:
            OSError: a record cannot be read, or the cache cannot be written.
        """
        for name in names:
            history = self.history(name)
            while history is not None and history.catch_up():
                pass

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.look()
            more = False
            for path, history in list(self._histories.items()):
                try:
                    more |= history.catch_up()
                    self.problems.pop(path, None)
                except OSError as error:
                    self.problems[path] = str(error)
            if more:
                time.sleep(BREATH_S)
            else:
                self._wake.wait(POLL_S)
                self._wake.clear()

    def _private_cache(self, path: Path) -> Path:
        """A directory that no other process uses: a second page on the run has its own."""
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        try:
            for number in range(MAX_READERS):
                directory = self._cache / f"{path.name[:60]}-{key}-{number}"
                directory.mkdir(parents=True, exist_ok=True)
                lock = (directory / "lock").open("w")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                self._locks.append(lock)
                return directory
        except OSError:
            pass  # a home that is full or not writable must not keep the page shut
        return Path(tempfile.mkdtemp(prefix="trinity-monitor-"))


def default_cache() -> Path:
    """Where histories are kept between uses."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "trinity" / "monitor"
