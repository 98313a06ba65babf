"""A run goes on with another number of ranks: equal rows, equal state."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.attempts import (
    SMALLEST,
    assert_same_state,
    curve,
    run_to_end,
)
from trinity.train.metrics import read_metrics

NUM_STEPS, HALF = 8, 4
OVERRIDES = [*SMALLEST, "batch.rows_per_step=12", "data.lanes=4", "checkpoint.every_steps=4"]
OVERRIDES += ["model.num_experts=12"]
LOSS_TOLERANCE = 1e-4
"""Relative: sums over ranks are taken in another order."""


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of four ranks will be, with its first half made."""
    return tmp_path_factory.mktemp("four")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saved_by_four_ranks_resumed_by_others(
    tiny_toml: Path, tmp_path: Path, saved_by_four: Path, world_size: int
) -> None:
    arguments = [tiny_toml, *OVERRIDES]
    first, whole = saved_by_four / "first", saved_by_four / "whole"
    if not whole.exists():
        for run_dir, steps in ((first, HALF), (whole, NUM_STEPS)):
            own = [*arguments, f"train.num_steps={steps}", "--run-dir", run_dir]
            run_to_end(saved_by_four / "log", own, world_size=4)
    resized = tmp_path / "resized"
    shutil.copytree(first, resized)
    log = tmp_path / "log"
    # Nothing is trained, the state is loaded and saved again.
    own = [f"train.num_steps={HALF}", "--resume", resized]
    shutil.rmtree(resized / "lock", ignore_errors=True)
    run_to_end(log, own, world_size=world_size)
    assert_same_state(resized, first, HALF)
    run_to_end(log, [f"train.num_steps={NUM_STEPS}", "--resume", resized], world_size=world_size)
    ours, theirs = read_metrics(resized, "train"), read_metrics(whole, "train")
    assert [row["step"] for row in ours] == list(range(1, NUM_STEPS + 1))
    for row, other in zip(ours, theirs, strict=True):
        assert row["num_tokens_seen"] == other["num_tokens_seen"]
        assert row["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE)
    assert curve(resized)[:HALF] == curve(whole)[:HALF]
    _assert_same_place(resized, whole)


def _assert_same_place(first: Path, second: Path) -> None:
    """Both have read the same rows: their positions in every lane of the stream are equal."""
    from tests.faults.attempts import state

    ours, theirs = state(first, NUM_STEPS), state(second, NUM_STEPS)
    places = [name for name in ours if name.startswith("data.")]
    assert places
    for name in places:
        assert ours[name].equal(theirs[name]), name
