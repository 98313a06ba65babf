"""Runs that are written by hand, a watcher with a clock of the test's own, and a web service."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from prometheus_client import CollectorRegistry, generate_latest

from trinity.monitor.exporter import Watcher
from trinity.monitor.serve_metrics import families


class FakeRun:
    """A run directory in which a test plays the trainer."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / "metrics.jsonl"

    def write(self, kind: str, step: int, at: float | None = None, **values: Any) -> Self:
        """Append one record; ``at`` in unix seconds, now where it is None."""
        record = {"kind": kind, "step": step, "time": time.time() if at is None else at, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return self

    def train(self, step: int, at: float | None = None, **values: Any) -> Self:
        """Append a "train" record."""
        load = [[10, 20, 30, 40], [25, 25, 25, 25]]
        basic = {"loss": 2.0, "num_tokens_seen": 100 * step, "next_row": 8 * step, "load": load}
        return self.write("train", step, at, **{**basic, **values})

    def event(self, step: int, event: str, at: float | None = None, **values: Any) -> Self:
        """Append an "event" record."""
        return self.write("event", step, at, event=event, text=f"the text of {event}", **values)

    def alarm(self, step: int, name: str, severity: str, at: float | None = None) -> Self:
        """Append an alarm."""
        details = {"value": 9.0, "condition": "above 6", "first": "look at the rows"}
        return self.event(step, "alarm", at, name=name, severity=severity, **details)

    def cut_to(self, step: int) -> None:
        """Rewrite the record without anything beyond ``step``; a resume spares events, but need
        not."""
        lines = self.path.read_text().splitlines(keepends=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
        temporary.replace(self.path)


class Service(http.server.ThreadingHTTPServer):
    """Keeps the bodies of POSTs; answers with the statuses planned, then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.hang = threading.Event()
        """Set: requests are read and not answered until it is cleared."""
        self.methods: list[str] = []

    @property
    def url(self) -> str:
        """An address with a secret in it, as services give them."""
        return f"http://127.0.0.1:{self.server_port}/services/SECRET?token=SECRET"

    def texts(self) -> list[str]:
        """What people would read."""
        return [body["text"] for body in self.bodies]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(
            self.rfile.read(int(self.headers["Content-Length"])), parse_constant=_refuse_constant
        )
        self.server.methods.append("POST")
        while self.server.hang.is_set():
            time.sleep(0.02)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append(body)
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.methods.append("GET")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@contextmanager
def serving() -> Iterator[Service]:
    """A :class:`Service` on a free port of loopback."""
    service = Service()
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.hang.clear()
        service.shutdown()
        service.server_close()
        thread.join()


class Watch:
    """A watcher with a clock of the test's own, and what one scrape of it returns."""

    def __init__(self, root: Path, webhook: str | None = None) -> None:
        self.log: list[str] = []
        self.watcher = Watcher(root, webhook=webhook, say=self.log.append)
        self.late_s = 0.0

    def poll(self, late_s: float = 0.0) -> dict[str, float]:
        """One round; ``late_s``: seconds that have passed besides."""
        self.late_s += late_s
        now = time.time() + self.late_s
        runs, watch = self.watcher.poll(now)
        self.watcher.deliver(now, 5.0)
        registry = CollectorRegistry(auto_describe=False)
        collected = families(runs, watch)
        registry.register(type("Collected", (), {"collect": lambda _: collected})())
        lines = generate_latest(registry).decode().splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        assert len({name for name, _, _ in samples}) == len(samples)  # no series twice
        return {name: float(value) for name, _, value in samples}


def alarms(series: dict[str, float], run: str, name: str, severity: str) -> float:
    """How many alarms are counted."""
    return series[f'trinity_alarms_total{{name="{name}",run="{run}",severity="{severity}"}}']


def events(series: dict[str, float], run: str, event: str) -> float:
    """How many events are counted."""
    return series[f'trinity_events_total{{event="{event}",run="{run}"}}']


def state(series: dict[str, float], run: str = "base") -> str:
    """The one state that a run is in."""
    prefix = f'trinity_run_state{{run="{run}",state="'
    states = [name.removeprefix(prefix)[:-2] for name, x in series.items() if x == 1.0
              and name.startswith(prefix)]  # fmt: skip
    assert len(states) == 1
    return states[0]
