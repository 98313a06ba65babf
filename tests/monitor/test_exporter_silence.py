"""What state a run is in, and the alarm for one that has fallen silent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.exporter_support import FakeRun, Service, Watch, alarms, events, serving, state
from trinity.core.instruments import instruments
from trinity.monitor import follow

LEVEL_S = instruments()["last_step"].level


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state/trinity").mkdir(parents=True)
    monkeypatch.setattr(follow, "HOLD_S", 0.0)


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as running:
        yield running


PROGRESS: dict[str, tuple[Callable[[FakeRun], Any], str]] = {
    "fresh": (lambda run: run.event(0, "started"), "starting"),
    "stepping": (lambda run: run.event(0, "started").train(1), "running"),
    "resumed": (lambda run: run.train(1, time.time() - 500).event(1, "resumed"), "starting"),
    "silent": (lambda run: run.train(1, time.time() - LEVEL_S - 1), "silent"),
    "copied, files are new": (
        lambda run: run.train(1, time.time() - 500).directory.joinpath("heartbeat").write_text("1"),
        "silent",
    ),
    "logged rarely": (
        lambda run: run.train(1, time.time() - 500).directory.joinpath("heartbeat").write_text("7"),
        "running",
    ),
    "never started": (lambda run: run.event(0, "started", time.time() - 2000), "silent"),
    "stopped": (lambda run: run.train(1, time.time() - 500).event(1, "stopped"), "stopped"),
    "stopped, records late": (lambda run: run.event(1, "stopped").train(1), "stopped"),
    "stopped, resumed": (lambda run: run.event(1, "stopped").train(1).train(2), "running"),
    "failed": (lambda run: run.train(1, time.time() - 500).event(1, "gave_up"), "failed"),
    "finished": (lambda run: run.train(1, time.time() - 500).event(1, "finished"), "finished"),
    "done": (
        lambda run: run.train(1, time.time() - 500).directory.joinpath("DONE").touch(),
        "finished",
    ),
    "only a configuration": (
        lambda run: run.directory.joinpath("config.toml").touch(),
        "starting",
    ),
}


@pytest.mark.parametrize("name", PROGRESS)
def test_state_of_a_run(tmp_path: Path, name: str) -> None:
    write, expected = PROGRESS[name]
    write(FakeRun(tmp_path / "runs/base"))
    assert state(Watch(tmp_path / "runs").poll()) == expected


def test_silence_is_an_alarm_once_and_its_end_is_told(tmp_path: Path, service: Service) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs", service.url)
    assert state(watch.poll(late_s=LEVEL_S - 10)) == "running"
    assert service.bodies == []
    series = watch.poll(late_s=20)
    assert state(series) == "silent"
    assert alarms(series, "base", "last_step", "page") == 1
    watch.poll(late_s=20)
    assert [body["trinity"]["event"] for body in service.bodies] == ["alarm"]
    assert service.texts()[0].startswith("[page] base, step 1, alarm: Time since the last step")
    # A restart of the watcher tells it neither again, nor forgets that it was told.
    again = Watch(tmp_path / "runs", service.url)
    again.late_s = watch.late_s
    again.poll(late_s=20)
    assert len(service.bodies) == 1
    run.train(2)
    assert state(again.poll()) == "running"
    assert [body["trinity"]["event"] for body in service.bodies] == ["alarm", "silence_over"]


@pytest.mark.parametrize("end", ["finished", "stopped", "gave_up"])
def test_run_that_has_ended_is_not_silent(tmp_path: Path, service: Service, end: str) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs", service.url)
    watch.poll()
    run.event(1, end)
    watch.poll(late_s=10 * LEVEL_S)
    series = watch.poll(late_s=10 * LEVEL_S)
    assert alarms(series, "base", "last_step", "page") == 0
    assert not [text for text in service.texts() if "last step" in text]


def test_heartbeat_counts_as_progress_whatever_its_clock_says(tmp_path: Path) -> None:
    """The file server's clock is ten minutes behind, and steps are logged rarely."""
    run = FakeRun(tmp_path / "runs/base").train(1)
    beat = run.directory / "heartbeat"
    watch = Watch(tmp_path / "runs")
    for step in range(1, 6):
        beat.write_text(f"{step}\n")
        os.utime(beat, (time.time() - 600 + step,) * 2)
        series = watch.poll(late_s=LEVEL_S - 10)
        if step > 1:
            assert state(series) == "running"
    assert state(watch.poll(late_s=LEVEL_S + 10)) == "silent"


def test_heartbeat_of_the_last_step_does_not_undo_a_stop(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").event(0, "started")
    beat = run.directory / "heartbeat"
    beat.write_text("4\n")
    watch = Watch(tmp_path / "runs")
    watch.poll()
    run.event(5, "stopped")
    watch.poll()
    beat.write_text("")  # it is being written
    assert state(watch.poll()) == "stopped"
    beat.write_text("5\n")
    assert state(watch.poll()) == "stopped"
    beat.write_text("6\n")
    assert state(watch.poll()) == "running"


def test_resumed_run_may_take_its_time_to_start(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1).train(2).train(3)
    (run.directory / "heartbeat").write_text("3\n")
    watch = Watch(tmp_path / "runs")
    watch.poll()
    run.cut_to(2)
    run.event(2, "resumed")
    watch.poll()
    assert state(watch.poll(late_s=follow.START_S - 10)) == "starting"
    assert state(watch.poll(late_s=20)) == "silent"
    run.train(3)
    assert state(watch.poll()) == "running"


def test_clock_ahead_does_not_hide_silence(tmp_path: Path) -> None:
    FakeRun(tmp_path / "runs/base").train(1, time.time() + 3600)
    watch = Watch(tmp_path / "runs")
    watch.poll()
    assert state(watch.poll(late_s=LEVEL_S + 1)) == "silent"


@pytest.mark.parametrize("says_so", [True, False])
def test_end_is_told_once_whether_or_not_the_trainer_tells_it(
    tmp_path: Path, service: Service, says_so: bool
) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    FakeRun(tmp_path / "runs/history").train(1, time.time() - 5000)
    old = tmp_path / "runs/history/DONE"
    old.touch()
    os.utime(old, (time.time() - 5000,) * 2)
    watch = Watch(tmp_path / "runs", service.url)
    watch.poll()
    if says_so:
        run.event(1, "finished")
    (run.directory / "DONE").touch()
    os.utime(run.directory / "DONE", (time.time() + 100,) * 2)  # the file server's clock is ahead
    watch.poll()
    series = Watch(tmp_path / "runs", service.url).poll()
    told = [(body["trinity"]["run"], body["trinity"]["event"]) for body in service.bodies]
    assert told == [("base", "finished")]
    assert events(series, "base", "finished") == 1
    assert state(series, "base") == state(series, "history") == "finished"
    # It is resumed with more steps, and finishes once more.
    (run.directory / "DONE").unlink()
    run.event(1, "resumed").train(2)
    watch = Watch(tmp_path / "runs", service.url)
    assert state(watch.poll()) == "running"
    (run.directory / "DONE").touch()
    watch.poll()
    assert [body["trinity"]["step"] for body in service.bodies] == [1, 2]
