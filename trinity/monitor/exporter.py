"""``trinity watch``: follows the runs below a directory, serves ``/metrics`` and sends webhooks.

It reads files only and never talks to a trainer, so it can run anywhere that sees the directory,
and it notices the trainer that is dead. What it has counted and sent survives its restart in one
small file (:func:`state_path`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from trinity.core.errors import ConfigError
from trinity.core.run_files import CONFIG_FILE, METRICS_FILE
from trinity.monitor.follow import FollowedRun
from trinity.monitor.serve_metrics import MetricsServer, RunFacts, WatchFacts, families, printable
from trinity.monitor.webhook import Outbox, check_url

MAX_DEPTH = 3
"""Directories below the watched one in which runs are looked for."""
MAX_RUNS = 200
"""Runs that are exported; the rest, longest without a step, is left out."""
RECENT_S = 600.0
"""Of a directory that was never watched, events younger than this are news, older ones history."""
FORGET_S = 7 * 86400.0
"""How long the place in a run is remembered after its directory has vanished."""
SAVE_EVERY_S = 60.0
HISTORY_EVERY_S = 60.0
"""How often runs without a sign of life are looked at; there may be many, on a slow file system."""
MAX_POLL_S = 60.0
"""Beyond it the rules would take the watcher for stuck."""
DELIVERY_SHARE = 0.5
"""Share of the time between polls that may be spent on waiting for a webhook."""


def find_runs(root: Path) -> dict[str, Path]:
    """Run directories at or below ``root`` by name: the path from there.

    Links are not followed, or a run would be found twice. Raises OSError when ``root`` itself
    cannot be listed.
    """
    if _is_run(root):
        return {printable(root.resolve().name): root}
    found: dict[str, Path] = {}
    level = [root]
    for depth in range(MAX_DEPTH):
        below: list[Path] = []
        for directory in level:
            try:
                with os.scandir(directory) as entries:
                    inner = [
                        Path(e.path)
                        for e in entries
                        if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
                    ]
            except OSError:
                if depth == 0:
                    raise
                continue  # gone, or not ours to read
            for path in inner:
                if _is_run(path):
                    found[printable(str(path.relative_to(root)))] = path
                else:
                    below.append(path)
        level = below
    return dict(sorted(found.items()))


def _is_run(path: Path) -> bool:
    # Not Path.exists, which raises where somebody else's directory may not be searched.
    return any(os.path.exists(path / name) for name in (METRICS_FILE, CONFIG_FILE))


def state_path(root: Path) -> Path:
    """Where the watcher of ``root`` keeps its place: below ``XDG_STATE_HOME``."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return Path(base) / "trinity" / f"watch-{name}.json"


class Watcher:
    """Follows all runs below a directory; :meth:`poll` does one round. Not thread-safe."""

    def __init__(self, root: Path, *, webhook: str | None, say: Callable[[str], None]) -> None:
        """``say`` takes lines for the log."""
        self.root = root
        self._say = say
        self._path = state_path(root)
        saved = self._load()
        self._looked_at: float | None = saved.get("saved_at")
        self._places: dict[str, dict[str, Any]] = saved.get("runs", {})
        self._runs: dict[str, FollowedRun] = {}
        self._pending: list[dict[str, Any]] = saved.get("pending", [])
        self.outbox = None if webhook is None else Outbox(webhook, say, self._pending)
        self.num_errors = 0
        self._troubles: set[str] = set()
        self._next_save = self._next_history = 0.0

    def poll(self, now: float) -> tuple[list[RunFacts], WatchFacts]:
        """Read what is new, queue what has to be sent, keep the place; ``now`` in unix seconds."""
        self._find(now)
        has_news = False
        look_at_history = now >= self._next_history
        if look_at_history:
            self._next_history = now + HISTORY_EVERY_S
        for name, run in self._runs.items():
            if not (look_at_history or run.is_active(now)):
                continue
            try:
                news = run.poll(now)
                self._over(name)
            except OSError as error:
                self._trouble(name, f"{name}: cannot read it: {error}")
                continue
            has_news |= bool(news)
            if self.outbox is not None:
                for record in news:
                    self.outbox.add(name, record, now)
        # Before anything is sent: what is read must not be lost with this process.
        if has_news or now >= self._next_save:
            self.save(now)
        return self._facts(now)

    def deliver(self, now: float, budget_s: float) -> None:
        """Send queued messages for ``budget_s`` at most."""
        if self.outbox is not None and self.outbox.deliver(now, budget_s):
            self.save(now)

    def _find(self, now: float) -> None:
        try:
            found = find_runs(self.root)
        except OSError as error:
            # A file server that is away for a moment must not look like runs that have vanished.
            self._trouble("", f"{self.root}: cannot list it: {error}")
            return
        self._over("")
        for name in [name for name in self._runs if name not in found]:
            self._places[name] = self._runs.pop(name).place()
            self._say(f"{name}: vanished")
        # What a run did before the last look, when it was not here, is no news.
        since = (self._looked_at or now) - RECENT_S
        self._looked_at = now
        for name, path in found.items():
            if name not in self._runs:
                place = self._places.pop(name, None)
                self._runs[name] = FollowedRun(path, name, place, news_since=since, now=now)

    def _facts(self, now: float) -> tuple[list[RunFacts], WatchFacts]:
        active = [run for run in self._runs.values() if run.is_active(now)]
        active.sort(key=lambda run: run.last_sign, reverse=True)
        outbox = self.outbox
        watch = WatchFacts(
            polled_at=now,
            num_left_out=len(self._runs) - len(active[:MAX_RUNS]),
            num_errors=self.num_errors,
            pending=len(outbox.pending) if outbox else 0,
            sent=outbox.num_sent if outbox else 0,
            failed=outbox.num_failed if outbox else 0,
            dropped=outbox.num_dropped if outbox else 0,
        )
        return [run.facts(now) for run in active[:MAX_RUNS]], watch

    def _trouble(self, name: str, text: str) -> None:
        """Count an error; say it once, not at every poll."""
        self.num_errors += 1
        if name not in self._troubles:
            self._say(text)
        self._troubles.add(name)

    def _over(self, name: str) -> None:
        self._troubles.discard(name)

    def _load(self) -> dict[str, Any]:
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            if saved["version"] == 1:
                return saved
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(f"{self._path}: cannot use it, starting anew: {type(error).__name__}")
        return {}

    def save(self, now: float) -> None:
        """Keep the place, the counts and what waits for delivery, for the next process."""
        self._next_save = now + SAVE_EVERY_S
        self._places = {
            name: place for name, place in self._places.items() if now - place["seen_at"] < FORGET_S
        }
        places = self._places | {name: run.place() for name, run in self._runs.items()}
        pending = self.outbox.pending if self.outbox else self._pending
        text = json.dumps({"version": 1, "saved_at": now, "runs": places, "pending": pending})
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
            self._over("state")
        except OSError as error:
            # Better a message twice after a restart than no watcher.
            self._trouble("state", f"{self._path}: cannot write it: {error}")


@contextlib.contextmanager
def _only_watcher(root: Path) -> Iterator[None]:
    """Hold the lock of the state file. Raises ConfigError when another process does."""
    path = state_path(root).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot create it: {error}; set XDG_STATE_HOME to a directory that can be "
            "written"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{root} is being watched already: {path} is locked; stop the other trinity watch"
            ) from None
        yield


def watch_command(
    directory: Path, *, host: str, port: int, webhook: str | None, poll_s: float
) -> None:
    """Run ``trinity watch`` until SIGTERM or SIGINT.

    Args:
        directory: a run, or a directory with runs below it.
        host, port: where ``/metrics`` is served; port 0 takes a free one.
        webhook: address to POST messages to, a secret; None sends none.
        poll_s: seconds between two looks at the files.

    Raises ConfigError when the directory, address, port or place for the state cannot be used.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give a run, or the directory of runs")
    if not 0 < poll_s <= MAX_POLL_S:
        raise ConfigError(f"--poll-s {poll_s} must be above 0, {MAX_POLL_S:g} at most; 5 is good")
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(f"{time.strftime('%F %T')} {text}", markup=False)

    where = f"; webhooks to {check_url(webhook)}" if webhook else ""
    done = threading.Event()
    with _only_watcher(directory):
        watcher = Watcher(directory, webhook=webhook, say=say)
        server = MetricsServer(host, port)
        before = {
            number: signal.signal(number, lambda *_: done.set())
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            say(f"watching {directory}; http://{host}:{server.port}/metrics{where}")
            while not done.is_set():
                runs, watch = watcher.poll(time.time())
                server.publish(families(runs, watch))
                watcher.deliver(time.time(), DELIVERY_SHARE * poll_s)
                done.wait(poll_s)
            watcher.save(time.time())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            server.close()
