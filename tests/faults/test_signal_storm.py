"""However often and whenever a run is asked to stop: one save, one exit status."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.attempts import (
    SMALLEST,
    Attempt,
    assert_same_state,
    assert_sound,
    curve,
    reach,
    run_to_end,
    step_of,
)
from trinity.ckpt.store import list_checkpoints
from trinity.core.runtime import SAVED_AND_STOPPED_EXIT_CODE

NUM_STEPS = 40
OVERRIDES = [*SMALLEST, f"train.num_steps={NUM_STEPS}", "checkpoint.every_steps=0"]
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


def _storm(attempt: Attempt) -> None:
    """Signals to every rank without a pause, until all have ended."""
    dice = random.Random()
    while any(process.is_alive() for process in attempt.processes):
        for rank in range(len(attempt.processes)):
            attempt.signal(dice.choice(REQUESTS), rank)
        time.sleep(dice.uniform(0, 0.002))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "how"),
    [
        (1, "background"),
        pytest.param(1, "at once", marks=SLOW),
        pytest.param(2, "background", marks=SLOW),
    ],
)
def test_a_storm_of_signals_is_one_request(
    tiny_toml: Path, tmp_path: Path, world_size: int, how: str
) -> None:
    arguments = [tiny_toml, *OVERRIDES, f"checkpoint.asynchronous={how == 'background'}".lower()]
    whole, victim = tmp_path / "whole", tmp_path / "victim"
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", whole], world_size=world_size)
    arguments += ["--run-dir", victim, "--auto-resume"]
    attempt = Attempt(tmp_path / "victim-log", arguments, world_size=world_size)
    reach(attempt, victim, 4)
    _storm(attempt)
    assert attempt.statuses() == [SAVED_AND_STOPPED_EXIT_CODE] * world_size, attempt.log()
    (path,) = list_checkpoints(victim)
    assert int(path.name[5:]) == step_of(victim)
    assert_sound(victim)
    run_to_end(tmp_path / "victim-log", arguments, world_size=world_size)
    assert curve(victim) == curve(whole)
    assert_same_state(victim, whole, NUM_STEPS)


def test_a_signal_inside_a_save_waits_for_it(tiny_toml: Path, tmp_path: Path) -> None:
    from trinity.ckpt import store

    def slow(_: int) -> None:
        plain = store.write_manifest

        def write_manifest(*arguments: object) -> None:
            for _ in range(20):
                os.kill(os.getpid(), random.choice(REQUESTS))
                time.sleep(0.01)
            plain(*arguments)  # type: ignore[arg-type]

        store.write_manifest = write_manifest  # type: ignore[assignment]

    arguments = [tiny_toml, *OVERRIDES, "checkpoint.every_steps=5", "--run-dir", tmp_path / "run"]
    attempt = Attempt(tmp_path / "log", arguments, before=slow)
    assert attempt.wait() == SAVED_AND_STOPPED_EXIT_CODE, attempt.log()
    newest = list_checkpoints(tmp_path / "run")[0]
    assert int(newest.name[5:]) == step_of(tmp_path / "run")
    assert_sound(tmp_path / "run")
