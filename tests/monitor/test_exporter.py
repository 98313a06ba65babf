"""What a watcher knows of runs, exports and sends; across resumes, restarts and vanished files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.monitor.exporter_support import (
    FakeRun,
    Service,
    Watch,
    alarms,
    events,
    serving,
    state,
)
from trinity.core.instruments import instruments
from trinity.monitor import exporter, follow
from trinity.monitor.exporter import find_runs, state_path


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state/trinity").mkdir(parents=True)
    monkeypatch.setattr(follow, "HOLD_S", 0.0)


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as running:
        yield running


def test_newest_record_of_each_kind_is_exported(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1, loss=9.0).train(2, mfu=None, z=float("nan"))
    run.write("instruments", 2, bias_norm=0.25, rank_ms=[1.0, 2.0])
    run.write("validation", 2, loss=3.5, **{"books & <web>": 3.25})
    run.write("checkpoint", 2, written_s=1.5, num_bytes=10)
    series = Watch(tmp_path / "runs").poll()
    assert series['trinity_loss{run="base"}'] == 2.0
    assert series['trinity_bias_norm{run="base"}'] == 0.25
    assert series['trinity_validation_loss{run="base"}'] == 3.5
    assert series['trinity_source_loss{run="base",source="books & <web>"}'] == 3.25
    assert series['trinity_checkpoint_written_seconds{run="base"}'] == 1.5
    assert series['trinity_last_step{run="base"}'] == 2
    assert series['trinity_tokens_total{run="base"}'] == 200
    assert str(series['trinity_z{run="base"}']) == "nan"
    assert not [name for name in series if name.startswith("trinity_mfu")]
    share = 'trinity_expert_load_share{{layer="{}",run="base",stat="{}"}}'.format
    assert [series[share(0, stat)] for stat in ("min", "max")] == [0.4, 1.6]
    assert [series[share(1, stat)] for stat in ("min", "max", "entropy")] == [1.0, 1.0, 1.0]
    assert series[share(0, "entropy")] == pytest.approx(0.9232, abs=1e-4)


def test_records_of_any_shape_do_not_stop_the_watcher(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base")
    run.train(1, load=[], loss="high", num_tokens_seen=None).train(2, load=[[], [0, 0], [5]])
    run.train(3, load=[1, 2], loss=10**400).write("event", 3, event=["odd"]).write("new", 3)
    run.event(3, "alarm", name="unheard_of", severity="page").event(3, "unheard_of")
    with run.path.open("ab") as file:
        file.write(b"\xff\n\0\0\n{}\n")
    series = Watch(tmp_path / "runs").poll()
    assert series['trinity_loss{run="base"}'] == float("inf")
    assert alarms(series, "base", "other", "page") == 1
    assert events(series, "base", "other") == 2
    assert series['trinity_bad_lines{run="base"}'] == 3


def test_all_counters_start_at_zero(tmp_path: Path) -> None:
    FakeRun(tmp_path / "runs/base").event(0, "started")
    series = Watch(tmp_path / "runs").poll()
    for row in instruments().values():
        assert alarms(series, "base", row.name, row.severity) == 0
    assert events(series, "base", "started") == 1
    assert events(series, "base", "rewind") == 0


def test_series_do_not_grow_with_steps_or_experts(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    watch = Watch(tmp_path / "runs")
    first = watch.poll().keys()
    for step in range(2, 50):
        run.train(step, load=[[1] * 256] * 2).alarm(step, f"name{step}", "page")
        run.event(step, f"event{step}")
    assert watch.poll().keys() == first


def test_old_runs_and_too_many_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "MAX_RUNS", 2)
    day_ago = time.time() - follow.ACTIVE_S - 10
    for number in range(4):
        FakeRun(tmp_path / f"runs/r{number}").train(1, time.time() - 100 * number)
    FakeRun(tmp_path / "runs/history").train(1, day_ago)
    series = Watch(tmp_path / "runs").poll()
    assert {x.split('"')[1] for x in series if x.startswith("trinity_loss{")} == {"r0", "r1"}
    assert series["trinity_watch_runs_left_out"] == 3


def test_run_of_long_ago_comes_back_with_its_next_step(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1, time.time() - follow.ACTIVE_S - 10)
    watch = Watch(tmp_path / "runs")
    assert 'trinity_loss{run="base"}' not in watch.poll()
    run.train(2)
    assert state(watch.poll(late_s=exporter.HISTORY_EVERY_S + 1)) == "running"


def test_vanished_run_leaves_no_series_and_may_come_back(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    watch = Watch(tmp_path / "runs")
    before = watch.poll()
    run.directory.rename(tmp_path / "aside")
    assert not [name for name in watch.poll() if "base" in name]
    (tmp_path / "aside").rename(run.directory)
    assert watch.poll().keys() == before.keys()
    assert alarms(watch.poll(), "base", "loss", "page") == 1


def test_directory_that_cannot_be_listed_is_no_vanished_run(tmp_path: Path) -> None:
    FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs")
    watch.poll()
    (tmp_path / "runs").rename(tmp_path / "away")
    series = watch.poll()
    assert 'trinity_loss{run="base"}' in series
    assert series["trinity_watch_errors_total"] == 1
    watch.poll()
    assert len([line for line in watch.log if "cannot list" in line]) == 1


def test_runs_are_found_below_and_links_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("a", "sweep/b", "sweep/deep/c", "sweep/deep/er/d", ".hidden", "a/inner"):
        FakeRun(root / name).train(1)
    (root / "link").symlink_to(root / "a")
    (root / "empty").mkdir()
    assert list(find_runs(root)) == ["a", "sweep/b", "sweep/deep/c"]
    assert find_runs(root / "a") == {"a": root / "a"}
    bad = os.fsencode(root) + b"/bad\xff"
    os.mkdir(bad)
    Path(os.fsdecode(bad), "metrics.jsonl").touch()
    assert "bad\\udcff" in find_runs(root)
    Watch(root).poll()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_directory_of_somebody_else_hides_no_runs(tmp_path: Path) -> None:
    FakeRun(tmp_path / "base").train(1)
    FakeRun(tmp_path / "private").directory.chmod(0)
    assert list(find_runs(tmp_path)) == ["base"]


def test_resume_and_rewind_do_not_disturb_the_counters(tmp_path: Path, service: Service) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    run.train(2).alarm(2, "loss", "page").train(3)
    watch = Watch(tmp_path / "runs", service.url)
    assert alarms(watch.poll(), "base", "loss", "page") == 2
    run.cut_to(1)
    series = watch.poll()
    # A counter that falls reads as a restart to Prometheus, and its whole value as an increase.
    assert alarms(series, "base", "loss", "page") == 2
    assert series['trinity_tokens_total{run="base"}'] == 300
    assert series['trinity_last_step{run="base"}'] == 1
    run.train(2).alarm(2, "loss", "page")
    series = watch.poll()
    assert alarms(series, "base", "loss", "page") == 3
    assert series['trinity_tokens_total{run="base"}'] == 400
    assert [body["trinity"]["step"] for body in service.bodies] == [1, 2, 2]


def test_many_events_are_known_again_in_a_rewritten_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "MAX_SEEN", 5)
    run = FakeRun(tmp_path / "runs/base")
    for step in range(1, 21):
        run.event(step, "skip")
    watch = Watch(tmp_path / "runs")
    assert events(watch.poll(), "base", "skip") == 20
    run.cut_to(18)
    assert events(watch.poll(), "base", "skip") == 20
    run.event(19, "skip")
    assert events(watch.poll(), "base", "skip") == 21


def test_alarms_before_the_first_scrape_still_increase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "HOLD_S", 60.0)
    old = time.time() - 2 * exporter.RECENT_S
    run = FakeRun(tmp_path / "runs/base").alarm(1, "loss", "page", at=old).train(2)
    run.alarm(2, "loss", "page")
    watch = Watch(tmp_path / "runs")
    assert alarms(watch.poll(), "base", "loss", "page") == 1
    assert alarms(watch.poll(late_s=61), "base", "loss", "page") == 2


def test_restart_neither_repeats_nor_loses_alarms(tmp_path: Path, service: Service) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    first = Watch(tmp_path / "runs", service.url)
    before = first.poll()
    # While nobody watches: one more, then a resume that also forgets the first, and a new run.
    run.cut_to(0)
    run.train(2).alarm(2, "grad_norm", "warn").train(3)
    FakeRun(tmp_path / "runs/new").alarm(1, "loss", "page").train(1)
    second = Watch(tmp_path / "runs", service.url)
    series = second.poll()
    assert [
        (body["trinity"]["run"], body["trinity"]["name"]) for body in service.bodies
    ] == [("base", "loss"), ("base", "grad_norm"), ("new", "loss")]  # fmt: skip
    assert alarms(series, "base", "loss", "page") == alarms(before, "base", "loss", "page") == 1
    assert alarms(series, "base", "grad_norm", "warn") == 1
    assert series['trinity_loss{run="base"}'] == 2.0
    Watch(tmp_path / "runs", service.url).poll()
    assert len(service.bodies) == 3


def test_undelivered_message_survives_a_restart(tmp_path: Path, service: Service) -> None:
    service.statuses = [500]
    FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    first = Watch(tmp_path / "runs", service.url)
    assert first.poll()["trinity_webhook_pending"] == 1
    series = Watch(tmp_path / "runs", service.url).poll()
    assert len(service.bodies) == 1
    assert series["trinity_webhook_pending"] == 1  # exported before it was delivered
    assert "SECRET" not in state_path(tmp_path / "runs").read_text()


def test_message_is_kept_before_it_is_sent(tmp_path: Path, service: Service) -> None:
    """The watcher dies before it was delivered, and the record no longer holds the alarm."""
    run = FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs", service.url)
    watch.poll()
    run.alarm(2, "loss", "page")
    service.statuses = [500]
    watch.poll()
    run.cut_to(1)
    Watch(tmp_path / "runs", service.url).poll()
    assert [body["trinity"]["step"] for body in service.bodies] == [2]


def test_history_of_a_directory_never_watched_is_not_sent(tmp_path: Path, service: Service) -> None:
    old = time.time() - 2 * exporter.RECENT_S
    run = FakeRun(tmp_path / "runs/base").alarm(1, "loss", "page", at=old).train(2)
    run.alarm(2, "z", "warn").event(2, "skip").event(2, "rewind")
    series = Watch(tmp_path / "runs", service.url).poll()
    assert [body["trinity"]["event"] for body in service.bodies] == ["alarm", "rewind"]
    assert service.bodies[0]["trinity"]["name"] == "z"
    assert alarms(series, "base", "loss", "page") == 1


def test_old_run_that_is_moved_here_is_history(tmp_path: Path, service: Service) -> None:
    watch = Watch(tmp_path, service.url)
    watch.poll()
    run = FakeRun(tmp_path / "old").alarm(1, "loss", "page", at=time.time()).train(2)
    watch.poll(late_s=3 * exporter.RECENT_S)  # a look at the directory as it was before
    assert [body["trinity"]["name"] for body in service.bodies] == ["loss", "last_step"]
    run.directory.rename(tmp_path / "moved")
    watch.poll()
    assert [body["trinity"]["name"] for body in service.bodies].count("loss") == 1


def test_known_run_that_comes_back_has_its_news_told(tmp_path: Path, service: Service) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs", service.url)
    watch.poll()
    away = FakeRun(run.directory.rename(tmp_path / "away")).alarm(2, "loss", "page").train(3)
    watch.poll(late_s=3 * exporter.RECENT_S)
    away.directory.rename(tmp_path / "runs/base")
    watch.poll()
    assert service.bodies[0]["trinity"]["step"] == 2


def test_messages_wait_for_a_watcher_that_sends(tmp_path: Path, service: Service) -> None:
    service.statuses = [500]
    FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    Watch(tmp_path / "runs", service.url).poll()
    Watch(tmp_path / "runs").poll()
    Watch(tmp_path / "runs", service.url).poll()
    assert len(service.bodies) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', "null"])
def test_damaged_state_is_started_anew(tmp_path: Path, service: Service, text: str) -> None:
    state_path(tmp_path / "runs").write_text(text)
    FakeRun(tmp_path / "runs/base").train(1).alarm(1, "loss", "page")
    Watch(tmp_path / "runs", service.url).poll()
    assert len(service.bodies) == 1
    assert json.loads(state_path(tmp_path / "runs").read_text())["version"] == 1


def test_place_that_cannot_be_written_does_not_stop_the_watcher(
    tmp_path: Path, service: Service
) -> None:
    run = FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs", service.url)
    (tmp_path / "state/trinity").rmdir()
    run.alarm(1, "loss", "page")
    series = watch.poll()
    assert len(service.bodies) == 1
    assert series["trinity_watch_errors_total"] == 1
    assert "cannot write it" in watch.log[0]


def test_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    bad = FakeRun(tmp_path / "runs/bad")
    bad.path.mkdir()
    FakeRun(tmp_path / "runs/base").train(1)
    watch = Watch(tmp_path / "runs")
    series = watch.poll()
    assert 'trinity_loss{run="base"}' in series
    assert series["trinity_watch_errors_total"] == 1
    assert len(watch.log) == 1
