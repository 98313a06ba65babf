"""Two jobs and one run directory, and ranks that hang, in real training."""

from __future__ import annotations

import json
import os
import signal
import time
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
    reach,
    run_to_end,
)
from trinity.ckpt.store import list_checkpoints
from trinity.core.errors import ConfigError, TrainingError
from trinity.train import lock as lock_module
from trinity.train import watchdog as watchdog_module
from trinity.train.watchdog import HANG_EXIT_CODE

NUM_STEPS = 30
OVERRIDES = [*SMALLEST, f"train.num_steps={NUM_STEPS}", "checkpoint.every_steps=5"]


def test_the_second_job_refuses_and_changes_nothing(tiny_toml: Path, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [tiny_toml, *OVERRIDES]
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", whole])

    def pause(_: int) -> None:
        at_step(12, lambda: os.kill(os.getpid(), signal.SIGSTOP))

    arguments += ["--run-dir", run_dir, "--auto-resume"]
    first = Attempt(tmp_path / "first-log", arguments, before=pause)
    reach(first, run_dir, 11)  # the step before is told while the next one is computed
    (stale,) = [run_dir / "checkpoints/tmp-00000099-1"]
    stale.mkdir(exist_ok=True)  # of a save that the first job might be writing
    before = (run_dir / "config.toml").read_text()
    second = Attempt(tmp_path / "second-log", [*arguments, "optim.muon.lr=1"])
    assert second.wait() == ConfigError.exit_code
    told = second.log()
    assert f"{run_dir} is in use by process {first.processes[0].pid} on " in told
    assert "end that job first" in told
    assert (run_dir / "config.toml").read_text() == before
    assert stale.exists()
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.log()
    assert curve(run_dir) == curve(whole)


def test_a_job_whose_directory_was_taken_over_writes_nothing_more(
    tiny_toml: Path, tmp_path: Path
) -> None:
    """As after a node that was cut off from the file server comes back."""
    run_dir = tmp_path / "run"

    def lose(_: int) -> None:
        def take_over() -> None:
            (own,) = (run_dir / lock_module.LOCK_DIR).iterdir()
            owner = json.loads(own.read_text()) | {"host": "elsewhere", "token": "other"}
            own.with_name("00000002").write_text(json.dumps(owner))

        at_step(7, take_over, settled=True)

    arguments = [tiny_toml, *OVERRIDES, "--run-dir", run_dir]
    attempt = Attempt(tmp_path / "log", arguments, before=lose)
    assert attempt.wait() == TrainingError.exit_code, attempt.log()
    assert "no longer ours: process" in attempt.log()
    assert "on elsewhere" in attempt.log()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000005"]
    assert not events(run_dir, "checkpoint_failed")


def test_a_checkpoint_is_not_published_once_the_directory_is_lost(
    tiny_toml: Path, tmp_path: Path
) -> None:
    """The lock goes while the checkpoint is being written."""
    run_dir = tmp_path / "run"

    def lose(_: int) -> None:
        from trinity.ckpt import store

        plain = store.write_manifest

        def write_manifest(directory: Path, *more: object) -> None:
            plain(directory, *more)  # type: ignore[arg-type]
            if "00000010" in directory.name:
                (run_dir / lock_module.LOCK_DIR / "00000002").write_text("{}")

        store.write_manifest = write_manifest  # type: ignore[assignment]

    arguments = [tiny_toml, *OVERRIDES, "--run-dir", run_dir]
    attempt = Attempt(tmp_path / "log", arguments, before=lose)
    assert attempt.wait() == TrainingError.exit_code, attempt.log()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000005"]


@pytest.mark.slow
def test_a_frozen_rank_ends_the_job_which_then_goes_on(tiny_toml: Path, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [tiny_toml, *OVERRIDES]
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", whole], world_size=2)
    arguments += ["--run-dir", run_dir, "--auto-resume"]

    def freeze(rank: int) -> None:
        watchdog_module.GATHER_S = 2.0
        if rank == 1:
            at_step(12, lambda: os.kill(os.getpid(), signal.SIGSTOP))

    attempt = Attempt(
        tmp_path / "run-log", [*arguments, "train.hang_s=4"], world_size=2, before=freeze
    )
    assert attempt.wait(0) == HANG_EXIT_CODE, attempt.log()
    (event,) = events(run_dir, "hang")
    assert event["text"].startswith("rank 1 did not answer")
    assert "in all_reduce" in attempt.log() or "in wait" in attempt.log()
    attempt.kill()  # what a launcher does with the others
    assert_sound(run_dir)
    run_to_end(tmp_path / "run-log", arguments, world_size=2)
    assert curve(run_dir) == curve(whole)
    assert_same_state(run_dir, whole, NUM_STEPS)


@pytest.mark.slow
def test_a_rank_that_is_slow_but_within_the_limit_ends_nothing(
    tiny_toml: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def dawdle(rank: int) -> None:
        if rank == 1:
            at_step(5, lambda: time.sleep(2))

    arguments = [tiny_toml, *OVERRIDES, "train.hang_s=20", "--run-dir", run_dir]
    run_to_end(tmp_path / "log", arguments, world_size=2, before=dawdle)
    assert not events(run_dir, "hang")


@pytest.mark.slow
def test_a_rank_that_is_stuck_outside_of_collectives_is_named(
    tiny_toml: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def stick(rank: int) -> None:
        def read_forever() -> None:
            os.read(os.pipe()[0], 1)

        if rank == 1:
            at_step(8, read_forever)

    arguments = [tiny_toml, *OVERRIDES, "train.hang_s=4", "--run-dir", run_dir]
    attempt = Attempt(tmp_path / "log", arguments, world_size=2, before=stick)
    assert attempt.statuses() == [HANG_EXIT_CODE] * 2, attempt.log()
    (event,) = events(run_dir, "hang")
    assert event["text"].startswith("rank 1 on ")
    assert "in read_forever" in event["text"]
    assert "step 9" in event["text"]
