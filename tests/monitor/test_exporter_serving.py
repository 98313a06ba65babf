"""The process itself: starting, refusing, scraping, stopping; and under a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.exporter_support import FakeRun, serving
from tests.monitor.test_exporter_rules import queries, rules
from tools.alert_rules import ROOT, RULES
from trinity.core.errors import ConfigError
from trinity.monitor.exporter import watch_command
from trinity.monitor.serve_metrics import MetricsServer

PROMETHEUS = shutil.which("prometheus")
DEADLINE_S = 60.0

WATCH = """
import sys
from pathlib import Path
from trinity.monitor import exporter, follow
follow.HOLD_S = float(sys.argv[2])
exporter.watch_command(
    Path(sys.argv[1]), host="127.0.0.1", port=0, webhook=sys.argv[3] or None, poll_s=0.2
)
"""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@contextmanager
def watching(root: Path, webhook: str = "", hold_s: float = 0.0) -> Iterator[tuple[Any, str]]:
    """A watcher in a process of its own, and the address of its metrics."""
    command = [sys.executable, "-c", WATCH, str(root), str(hold_s), webhook]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield process, re.findall(r"http\S+/metrics", line)[0]
        finally:
            process.kill()


def fetch(url: str, **query: str) -> str:
    """What a page says."""
    text = urllib.parse.urlencode(query)
    with urllib.request.urlopen(f"{url}?{text}" if query else url, timeout=10) as response:
        return response.read().decode()


def wait_for(condition: Callable[[], Any]) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except OSError:
            pass  # not up yet
        time.sleep(0.1)
    raise AssertionError("it did not come to pass")


def test_new_step_is_served_and_a_signal_ends_it_cleanly(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    with watching(tmp_path / "runs") as (process, url):
        wait_for(lambda: 'trinity_last_step{run="base"} 1.0' in fetch(url))
        run.train(2)
        wait_for(lambda: 'trinity_last_step{run="base"} 2.0' in fetch(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_killed_watcher_loses_and_repeats_nothing(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    with serving() as service:
        with watching(tmp_path / "runs", service.url) as (process, url):
            wait_for(lambda: "trinity_loss{" in fetch(url))
            run.alarm(1, "loss", "page")
            wait_for(lambda: len(service.bodies) == 1)
            service.statuses = [500] * 1000
            run.alarm(2, "z", "warn")
            wait_for(lambda: len(service.statuses) < 1000)
            process.kill()
            process.wait(timeout=30)
        run.alarm(3, "loss", "page")
        service.statuses = []
        with watching(tmp_path / "runs", service.url):
            wait_for(lambda: len(service.bodies) >= 3)
            run.event(4, "finished")
            wait_for(lambda: len(service.bodies) >= 4)
    assert [body["trinity"]["step"] for body in service.bodies] == [1, 2, 3, 4]


def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "webhook": None, "poll_s": 1.0}
    with pytest.raises(ConfigError, match="no directory"):
        watch_command(tmp_path / "missing", **options)
    with pytest.raises(ConfigError, match="--poll-s"):
        watch_command(tmp_path, **{**options, "poll_s": 0.0})
    with pytest.raises(ConfigError, match="--webhook"):
        watch_command(tmp_path, **{**options, "webhook": "nonsense"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .*choose another"):
            watch_command(tmp_path, **{**options, "port": port})
    with watching(tmp_path), pytest.raises(ConfigError, match="being watched already"):
        watch_command(tmp_path, **options)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        watch_command(tmp_path, **options)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"trinity-pretrain\[watch\]"):
        MetricsServer("127.0.0.1", 0)


def test_watcher_does_not_load_torch() -> None:
    """It runs for months on a login node."""
    code = "import sys, trinity.monitor.exporter; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@contextmanager
def _prometheus(directory: Path, target: str) -> Iterator[str]:
    """A real server over the shipped rules; the address of its API."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "trinity", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        str(PROMETHEUS),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address={address}",
    ]
    log = (directory / "prometheus.log").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}/api/v1"
        finally:
            process.kill()


@pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus is not on PATH; apt-get install prometheus"
)
def test_real_prometheus_fires_for_a_planted_alarm_and_a_silent_run(tmp_path: Path) -> None:
    root, ago = tmp_path / "runs", time.time() - 400
    base = FakeRun(root / "base").event(0, "started").train(1)
    FakeRun(root / "silent").event(0, "started", ago).train(1, ago)
    FakeRun(root / "finished").train(1, ago).event(1, "finished", ago)
    FakeRun(root / "finished").directory.joinpath("DONE").touch()
    with (
        watching(root, hold_s=2.0) as (_, url),
        _prometheus(tmp_path, urllib.parse.urlsplit(url).netloc) as api,
    ):

        def firing() -> set[tuple[str, str, str]]:
            alerts = json.loads(fetch(f"{api}/alerts"))["data"]["alerts"]
            found = [alert["labels"] for alert in alerts if alert["state"] == "firing"]
            return {(x["alertname"], x.get("run", ""), x["severity"]) for x in found}

        silent = ("TrinityLastStep", "silent", "page")
        wait_for(lambda: silent in firing())
        count = 'trinity_alarms_total{run="base",name="loss",severity="page"}'
        wait_for(lambda: json.loads(fetch(f"{api}/query", query=count))["data"]["result"])
        base.train(2).alarm(2, "loss", "page").event(2, "rewind")
        planted = {("TrinityLoss", "base", "page"), ("TrinityEventRewind", "base", "warn")}
        wait_for(lambda: planted <= firing())
        # `silent` was called so by the watcher as well, an alarm that no rule repeats.
        assert firing() == {silent, *planted}
        for query in [*queries(), *(rule["expr"] for rule in rules().values())]:
            assert json.loads(fetch(f"{api}/query", query=query))["status"] == "success"
        print(f"firing: {sorted(firing())}")
    assert "level=error" not in (tmp_path / "prometheus.log").read_text()
