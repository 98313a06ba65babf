"""kill -9 at any moment, in a save too: resuming always works and nothing differs afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
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

NUM_STEPS, EVERY = 60, 3
OVERRIDES = [*SMALLEST, f"train.num_steps={NUM_STEPS}", f"checkpoint.every_steps={EVERY}"]


@pytest.fixture
def undisturbed(tiny_toml: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "undisturbed"
    run_to_end(tmp_path / "log", [tiny_toml, *OVERRIDES, "--run-dir", run_dir])
    return run_dir


def _newest(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in list_checkpoints(run_dir)), default=0)


def _kill_some_time(attempt: Attempt, run_dir: Path, dice: random.Random) -> str:
    """Kill while it starts, at a step, or half of the times in a save; says which."""
    moment = dice.choice(["start", "step", "save", "save"])
    process = attempt.processes[0]
    deadline_s = time.monotonic() + 60
    if moment == "start":
        process.join(dice.uniform(0, 1.5))
    elif moment == "step":
        wanted = _newest(run_dir) + dice.randint(1, 2 * EVERY)
        while process.is_alive() and step_of(run_dir) < wanted and time.monotonic() < deadline_s:
            time.sleep(0.001)
    else:
        root, skipped = run_dir / "checkpoints", dice.randint(0, 1)
        seen: set[str] = set()
        while process.is_alive() and len(seen) <= skipped and time.monotonic() < deadline_s:
            seen |= {path.name for path in root.glob("tmp-*")}
        time.sleep(dice.uniform(0, 0.1))
    was_saving = any((run_dir / "checkpoints").glob("tmp-*"))
    attempt.kill()
    return "in a save" if was_saving else moment


def _run_under_kills(
    tiny_toml: Path, tmp_path: Path, undisturbed: Path, num_kills: int
) -> dict[str, int]:
    """Attempts, one after the other, until so many were killed; a finished run begins anew."""
    dice, kinds = random.Random(), dict.fromkeys(("start", "step", "save", "in a save"), 0)
    number, log = 0, tmp_path / "killed-log"

    def runs() -> Iterator[Path]:
        nonlocal number
        while True:
            number += 1
            yield tmp_path / f"killed-{number}"

    fresh = runs()
    run_dir = next(fresh)
    while sum(kinds.values()) < num_kills or not (run_dir / "DONE").exists():
        if (run_dir / "DONE").exists():
            _assert_undisturbed(run_dir, undisturbed)
            run_dir = next(fresh)
        attempt = Attempt(log, [tiny_toml, *OVERRIDES, "--run-dir", run_dir, "--auto-resume"])
        if sum(kinds.values()) >= num_kills:
            assert attempt.wait() == 0, attempt.log()
            continue
        kind = _kill_some_time(attempt, run_dir, dice)
        status = attempt.processes[0].exitcode
        assert status in (-9, 0), attempt.log()
        if status == 0:  # it was faster
            continue
        kinds[kind] += 1
        assert_sound(run_dir)
        # A save in flight when the next is due is waited for: so much may be made again, no more.
        assert step_of(run_dir) - _newest(run_dir) <= 2 * EVERY
    _assert_undisturbed(run_dir, undisturbed)
    return kinds


def _assert_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    assert curve(run_dir) == curve(undisturbed)
    assert_same_state(run_dir, undisturbed, NUM_STEPS)
    assert not list((run_dir / "checkpoints").glob("tmp-*"))


def test_a_few_kills(tiny_toml: Path, tmp_path: Path, undisturbed: Path) -> None:
    assert sum(_run_under_kills(tiny_toml, tmp_path, undisturbed, 4).values()) == 4


@pytest.mark.slow
def test_200_kills(tiny_toml: Path, tmp_path: Path, undisturbed: Path) -> None:
    kinds = _run_under_kills(tiny_toml, tmp_path, undisturbed, 200)
    print(kinds)
    assert kinds["in a save"] >= 40, kinds
    assert min(kinds["start"], kinds["step"]) >= 10, kinds


@pytest.mark.slow
def test_a_rank_of_two_is_killed(tiny_toml: Path, tmp_path: Path) -> None:
    arguments = [tiny_toml, *OVERRIDES, "train.num_steps=20", "parallel.timeout_s=30"]
    whole, victim = tmp_path / "whole", tmp_path / "victim"
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", whole], world_size=2)
    arguments += ["--run-dir", victim, "--auto-resume"]
    attempt = Attempt(tmp_path / "victim-log", arguments, world_size=2)
    reach(attempt, victim, 8)
    attempt.processes[1].kill()
    assert attempt.wait(1) == -9
    assert attempt.wait(0) not in (0, -9)  # it does not wait for the dead one
    assert_sound(victim)
    run_to_end(tmp_path / "victim-log", arguments, world_size=2)
    assert curve(victim) == curve(whole)
    assert_same_state(victim, whole, 20)
