"""A run that meets bad data goes back and around it, and ends as if it had never seen it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.poison import train
from tools.ranks import on_ranks
from trinity.ckpt.store import latest_checkpoint, load_tensors, stored_names
from trinity.core.errors import TrainingError
from trinity.train import step as step_module
from trinity.train.interventions import read_interventions
from trinity.train.metrics import read_metrics

POISON = range(160, 184)
"""Steps 41 to 46 of runs with 4 rows a step."""
STEPS = ["train.num_steps=70", "checkpoint.every_steps=30"]
REWIND = [
    "rewind.enabled=true",
    "rewind.snapshot_every_steps=10",
    "rewind.spikes=3",
    "rewind.window_steps=20",
    "rewind.margin_steps=5",
    "rewind.pad_steps=2",
]
SKIP = "stability.skip_spikes=true"


def _final(directory: Path) -> dict[str, torch.Tensor]:
    found, rejected = latest_checkpoint(directory)
    assert found is not None
    assert not rejected
    return load_tensors(found, stored_names(found))


def _assert_same_end(one: Path, other: Path) -> None:
    ours, theirs = _final(one), _final(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()), name


def _events(directory: Path, name: str) -> list[dict[str, object]]:
    return [row for row in read_metrics(directory, "event") if row["event"] == name]


def _never_saw(directory: Path) -> str:
    (entry,) = read_interventions(directory)
    assert entry.first_row <= POISON.start
    assert entry.end_row >= POISON.stop
    return f"data.skip_rows=[[{entry.first_row},{entry.end_row}]]"


@pytest.mark.parametrize("way", ["with skipping", "alone", "from disk"])
def test_a_rewound_run_ends_as_one_that_never_saw_the_rows(
    tiny_toml: Path, tmp_path: Path, way: str
) -> None:
    disk = f"rewind.snapshot_dir={tmp_path / 'snapshots'}"
    more = {"with skipping": [SKIP], "alone": [], "from disk": [disk]}[way]
    overrides = [*STEPS, *REWIND, *more]
    train(tiny_toml, tmp_path / "rewound", overrides, POISON)
    (event,) = _events(tmp_path / "rewound", "rewind")
    assert event["attempt"] == 1
    assert event["to_step"] == 30
    clean = [*STEPS, _never_saw(tmp_path / "rewound")]
    train(tiny_toml, tmp_path / "clean", clean, range(0))
    _assert_same_end(tmp_path / "rewound", tmp_path / "clean")
    losses = [row["loss"] for row in read_metrics(tmp_path / "rewound", "train")][-30:]
    assert max(losses) < 5.5
    assert not list((tmp_path / "snapshots").glob("*"))


def test_without_it_the_spike_is_there_for_all_to_see(tiny_toml: Path, tmp_path: Path) -> None:
    train(tiny_toml, tmp_path / "run", STEPS, POISON)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run", "train")}
    assert rows[41]["loss"] > rows[40]["loss"] + 2
    assert rows[41]["accepted"]
    (alarm,) = _events(tmp_path / "run", "alarm")
    assert (alarm["name"], alarm["step"]) == ("loss_score", 41)
    assert not (tmp_path / "run" / "interventions.json").exists()


def test_rewinding_under_fsdp_and_expert_parallelism(tiny_toml: Path, tmp_path: Path) -> None:
    ranks = ["parallel.ep=2", "batch.microbatch_rows=1", "train.num_steps=50", "data.lanes=4"]
    overrides = [*ranks, *REWIND, SKIP]
    on_ranks(4, _on_rank, tiny_toml, tmp_path / "rewound", overrides, POISON)
    clean = [*ranks, _never_saw(tmp_path / "rewound")]
    on_ranks(4, _on_rank, tiny_toml, tmp_path / "clean", clean, range(0))
    _assert_same_end(tmp_path / "rewound", tmp_path / "clean")


def _on_rank(toml: Path, directory: Path, overrides: list[str], rows: range) -> None:
    train(toml, directory, overrides, rows)


def test_a_restart_stays_on_the_new_path(tiny_toml: Path, tmp_path: Path) -> None:
    """Stopped soon after the rewind, the run resumes behind it and still skips the rows."""
    run = tmp_path / "run"
    overrides = [*STEPS, *REWIND, SKIP]
    train(tiny_toml, run, overrides, POISON)
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > 30:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (run / "DONE").unlink()
    whole = read_metrics(run, "train")[-1]
    resumed = train(tiny_toml, run, overrides, POISON, resume=True)
    assert resumed.step == 70
    again = read_metrics(run, "train")
    assert len(_events(run, "rewind")) == 1
    assert [row["step"] for row in again] == list(range(1, 71))
    assert again[-1]["loss"] == whole["loss"]
    assert again[-1]["next_row"] == whole["next_row"]


def test_giving_up_says_so_and_keeps_the_state_before(tiny_toml: Path, tmp_path: Path) -> None:
    overrides = [*STEPS, *REWIND, SKIP, "rewind.max_attempts=2"]
    with pytest.raises(TrainingError, match="after 2 rewinds nearby: giving up"):
        train(tiny_toml, tmp_path / "run", overrides, range(160, 2000))
    assert [event["attempt"] for event in _events(tmp_path / "run", "rewind")] == [1, 2]
    assert len(_events(tmp_path / "run", "gave_up")) == 1
    found, _ = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert int(found.name.removeprefix("step-")) <= 40


def test_skipped_steps_change_nothing_but_the_place_in_the_data(
    tiny_toml: Path, tmp_path: Path
) -> None:
    poison = range(160, 164)
    train(tiny_toml, tmp_path / "skipped", [*STEPS, SKIP], poison)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "skipped", "train")}
    assert [step for step, row in rows.items() if not row["accepted"]] == [41]
    (event,) = _events(tmp_path / "skipped", "skip")
    assert (event["first_row"], event["end_row"]) == (160, 164)
    assert rows[42]["loss"] < rows[40]["loss"] + 1


def test_too_many_skips_in_a_row_end_the_run(tiny_toml: Path, tmp_path: Path) -> None:
    overrides = [*STEPS, SKIP, "stability.max_skipped_in_a_row=4"]
    with pytest.raises(TrainingError, match="5 steps in a row were skipped"):
        train(tiny_toml, tmp_path / "run", overrides, POISON)


def test_steps_that_are_not_finite_count_as_spikes(tiny_toml: Path, tmp_path: Path) -> None:
    plain, calls = step_module.square_sum, [0]

    def overflowing(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return plain(*arguments) * (math.inf if calls[0] in range(41, 46) else 1.0)

    with mock.patch.object(step_module, "square_sum", overflowing):
        run = train(tiny_toml, tmp_path / "run", [*STEPS, *REWIND])
    assert run.step == 70
    (event,) = _events(tmp_path / "run", "rewind")
    assert event["reason"] == "4 spikes among 20 steps"
    assert len(_events(tmp_path / "run", "skip")) == 4
