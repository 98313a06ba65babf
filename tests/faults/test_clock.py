"""Nothing that a run does depends on what time the wall clock shows."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.attempts import SMALLEST, assert_same_state, curve, run_to_end

NUM_STEPS = 10
YEARS_S = 3e7


def _jump(_: int) -> None:
    """From now on every look at the clock finds it up to ten years off, either way."""
    plain, dice = time.time, random.Random()
    time.time = lambda: plain() + dice.uniform(-10, 10) * YEARS_S


def test_a_clock_that_jumps(tiny_toml: Path, tmp_path: Path) -> None:
    arguments = [tiny_toml, *SMALLEST, "checkpoint.every_steps=3", "train.hang_s=20"]
    arguments += ["log.tensorboard=true", f"train.num_steps={NUM_STEPS}"]
    run_to_end(tmp_path / "log", [*arguments, "--run-dir", tmp_path / "whole"])
    half = [*arguments, "--run-dir", tmp_path / "victim"]
    run_to_end(tmp_path / "victim-log", [*half, "train.num_steps=5"], before=_jump)
    run_to_end(tmp_path / "victim-log", [*half, "--auto-resume"], before=_jump)
    assert curve(tmp_path / "victim") == curve(tmp_path / "whole")
    assert_same_state(tmp_path / "victim", tmp_path / "whole", NUM_STEPS)
