"""What can be asked about a run at rest, and told to it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from tests.train.poison import train
from trinity.cli import app
from trinity.core.errors import ConfigError, TrainingError
from trinity.core.load_config import load_config
from trinity.parallel.stage import Stage
from trinity.train.command import replay_command, skip_rows_command
from trinity.train.inspect import documents_of_step, loader_of
from trinity.train.interventions import INTERVENTIONS_FILE, read_interventions

STEPS = ["train.num_steps=6", "checkpoint.every_steps=3"]


@pytest.fixture
def run_dir(tiny_toml: Path, tmp_path: Path) -> Path:
    train(tiny_toml, tmp_path / "run", STEPS)
    return tmp_path / "run"


def test_a_sound_machine_does_a_step_alike_each_time(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert replay_command(run_dir) == 0
    assert "step 7: the same each time; all copies agree" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {path.parent.name for path in after.keys() ^ before.keys()} <= {"lock"}
    assert all(after[path] == data for path, data in before.items() if path in after)


def test_a_machine_that_errs_is_told_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, calls = Stage.forward, [0]

    def erring(self: Stage, *arguments: object, **options: object) -> object:
        calls[0] += 1
        return plain(self, *arguments, **options) * (1.0 + 1e-6 * calls[0])  # type: ignore[arg-type]

    with mock.patch.object(Stage, "forward", erring):
        assert replay_command(run_dir) == TrainingError.exit_code
    assert "the same step gave other results" in capsys.readouterr().out


def test_skipped_steps_are_never_read_again(run_dir: Path, tiny_toml: Path) -> None:
    told = [documents_of_step(run_dir, step) for step in range(1, 9)]
    assert told[3][0].startswith("row 12: ")
    skip_rows_command(run_dir, 4, 5, "a bad shard")
    (entry,) = read_interventions(run_dir)
    assert (entry.first_row, entry.end_row, entry.reason) == (12, 20, "a bad shard")
    assert [documents_of_step(run_dir, step) for step in range(1, 7)] == told[:3] + told[5:]
    _, loader = loader_of(run_dir)
    assert loader.rows_after(12, 2) == [20, 21]
    (run_dir / "DONE").unlink()
    more = ["train.num_steps=9", "checkpoint.every_steps=3"]
    assert train(tiny_toml, run_dir, more, resume=True).loader.next_row == 36
    assert load_config(run_dir / "config.toml", []).train.num_steps == 9


def test_bad_requests_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps 5\.\.4: the last comes before"):
        skip_rows_command(run_dir, 5, 4, "")
    assert not (run_dir / INTERVENTIONS_FILE).exists()
    result = CliRunner().invoke(app, ["data", "show-step", str(run_dir), "0"])
    assert result.exit_code == 2
