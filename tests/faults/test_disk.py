"""Full disks and lost files: training goes on where it can, and says what is wrong where not."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.faults.attempts import (
    SMALLEST,
    Attempt,
    assert_same_state,
    assert_sound,
    at_step,
    curve,
    events,
    run_to_end,
)
from trinity.ckpt.store import list_checkpoints
from trinity.core.errors import CheckpointError, DataError
from trinity.train import sink as sink_module
from trinity.train.metrics import read_metrics
from trinity.train.sink import LineSink

NUM_STEPS = 12
OVERRIDES = [*SMALLEST, f"train.num_steps={NUM_STEPS}", "checkpoint.every_steps=3"]


def _limit_files(num_bytes: int) -> None:
    """What the process writes beyond this size of a file fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _full_between(first: int, end: int, num_bytes: int) -> None:
    sink_module.RETRY_S = 0.0
    at_step(first, lambda: _limit_files(num_bytes), settled=True)
    at_step(end, lambda: _limit_files(resource.RLIM_INFINITY), settled=True)


@pytest.mark.parametrize("how", ["background", pytest.param("at once", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_bytes", [60_000, 0], ids=["no checkpoint fits", "nothing fits"])
def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_nothing_else(
    tiny_toml: Path, tmp_path: Path, num_bytes: int, how: str
) -> None:
    arguments = [tiny_toml, *OVERRIDES, f"checkpoint.asynchronous={how == 'background'}".lower()]
    whole, victim = tmp_path / "whole", tmp_path / "victim"
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", whole])

    def fill(_: int) -> None:
        # Steps 6 and, in part, 7: one save, and one of the journal's lines at least.
        _full_between(5, 8, num_bytes)

    arguments += ["checkpoint.keep_last=9", "--run-dir", victim]
    run_to_end(tmp_path / "victim-log", arguments, before=fill)
    (event,) = events(victim, "checkpoint_failed")
    assert event["step"] == 6
    assert "training goes on: could not save step 6" in event["text"]
    assert "free space" in event["text"]
    assert [path.name[-2:] for path in list_checkpoints(victim)] == ["12", "09", "03"]
    assert_sound(victim)
    assert curve(victim) == curve(whole)  # no line is lost, none is torn
    assert_same_state(victim, whole, NUM_STEPS)


def test_a_last_state_that_cannot_be_saved_is_an_error(tiny_toml: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    arguments = [tiny_toml, *OVERRIDES, "--run-dir", victim, "--auto-resume"]

    def fill(_: int) -> None:
        at_step(NUM_STEPS - 2, lambda: _limit_files(60_000), settled=True)

    attempt = Attempt(tmp_path / "log", arguments, before=fill)
    assert attempt.wait() == CheckpointError.exit_code, attempt.log()
    assert f"error: could not save step {NUM_STEPS} in" in attempt.log()
    assert "the steps since are lost" in attempt.log()
    assert "Traceback" not in attempt.log()
    assert not (victim / "DONE").exists()
    assert list_checkpoints(victim)[0].name == "step-00000009"
    assert_sound(victim)
    run_to_end(tmp_path / "log", arguments)
    assert (victim / "DONE").exists()


@pytest.mark.slow
def test_a_log_on_a_full_disk_ends_nothing(tiny_toml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trinity", "pretrain", str(tiny_toml), *OVERRIDES]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "--run-dir", str(tmp_path / "run")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/DONE").exists()
    assert len(read_metrics(tmp_path / "run", "train")) == NUM_STEPS


def _write(sink: LineSink, *numbers: int) -> None:
    for number in numbers:
        sink.write(json.dumps({"number": number}))


def test_lines_wait_for_a_sink_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "RETRY_S", 0.0)
    path = tmp_path / "lines"
    sink = LineSink(path)
    _write(sink, 1)
    good, descriptor = os.dup(sink._file.fileno()), sink._file.fileno()
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
    with pytest.warns(UserWarning, match=r"cannot write: .*No space left"):
        _write(sink, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        _write(sink, 3)
    assert path.read_text() == '{"number": 1}\n'
    os.dup2(good, descriptor)
    _write(sink, 4)
    sink.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_nothing_torn_is_left_by_a_write_that_stops_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "RETRY_S", 0.0)
    path, limits = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = LineSink(path)
    _write(sink, 1)
    try:
        _limit_files(path.stat().st_size + 5)
        with pytest.warns(UserWarning, match="only a part of a line"):
            _write(sink, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == '{"number": 1}\n'
    _write(sink, 3)
    sink.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_sink_that_never_recovers_says_what_was_lost(tmp_path: Path) -> None:
    sink = LineSink(tmp_path / "lines")
    os.dup2(os.open("/dev/full", os.O_WRONLY), sink._file.fileno())
    with pytest.warns(UserWarning, match="cannot write"):
        _write(sink, 1, 2, 3)
    with pytest.warns(UserWarning, match="3 lines were lost"):
        sink.close()


def test_a_shard_that_is_cut_short_while_in_use_is_named(tiny_toml: Path, tmp_path: Path) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    arguments = [tiny_toml, *OVERRIDES, f"data.cache_dir={cache}", "--run-dir", victim]

    def cut(_: int) -> None:
        def truncate() -> None:
            for path in cache.rglob("*.bin"):
                os.truncate(path, 16)

        at_step(5, truncate)

    attempt = Attempt(tmp_path / "log", arguments, before=cut)
    assert attempt.wait() == DataError.exit_code, attempt.log()
    assert ".bin is damaged: it has ended before token" in attempt.log()
    assert_sound(victim)
    assert list_checkpoints(victim)[0].name == "step-00000003"
    for path in cache.rglob("*.json"):  # the remedy: delete the shard, it is built again
        if path.with_suffix(".bin").exists():
            path.with_suffix(".bin").unlink()
            path.unlink()
    run_to_end(tmp_path / "log", [*arguments, "--auto-resume"])


@pytest.mark.slow
def test_a_shard_that_is_removed_while_in_use_is_read_to_the_end(
    tiny_toml: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    arguments = [tiny_toml, *OVERRIDES, f"data.cache_dir={cache}"]
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", tmp_path / "whole"])

    def remove(_: int) -> None:
        def unlink() -> None:
            for path in cache.rglob("*.bin"):
                path.unlink()

        at_step(5, unlink)

    run_to_end(tmp_path / "log", [*arguments, "--run-dir", tmp_path / "victim"], before=remove)
    assert curve(tmp_path / "victim") == curve(tmp_path / "whole")
