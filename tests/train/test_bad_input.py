"""What users get wrong: one clear line, a non-zero exit status, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trinity.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from trinity.train.metrics import read_metrics


def _trinity(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trinity", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


def _fails(done: subprocess.CompletedProcess[str], kind: type[ConfigError], *parts: str) -> None:
    assert done.returncode == kind.exit_code, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_bad_configuration(tiny_toml: Path, tmp_path: Path) -> None:
    _fails(
        _trinity("pretrain", tiny_toml, "optim.muon.learning_rate=1"),
        ConfigError,
        "unknown key `optim.muon.learning_rate`",
    )
    _fails(_trinity("pretrain", tiny_toml, "train.num_steps=soon"), ConfigError, "train.num_steps")
    _fails(_trinity("pretrain", tmp_path / "absent.toml"), ConfigError, "absent.toml")
    _fails(_trinity("pretrain"), ConfigError, "give one configuration file")
    assert not (tmp_path / "runs").exists()  # nothing was started


def test_bad_data(tiny_toml: Path, tmp_path: Path) -> None:
    _fails(
        _trinity("pretrain", tiny_toml, "data.sources.0.path=nowhere.jsonl"),
        DataError,
        "'nowhere.jsonl' matches no file",
    )
    _fails(
        _trinity("pretrain", tiny_toml, "data.held_out_fraction=0.0"),
        DataError,
        "no held-out document",
        "data.held_out_fraction",
    )


@pytest.fixture
def run_dir(tiny_toml: Path, tmp_path: Path) -> Path:
    """A finished run with two checkpoints."""
    done = _trinity("pretrain", tiny_toml, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_bad_checkpoints(run_dir: Path, tiny_toml: Path, tmp_path: Path) -> None:
    _fails(
        _trinity("pretrain", tiny_toml, "--run-dir", run_dir), ConfigError, "already holds a run"
    )
    _fails(_trinity("pretrain", "--resume", tmp_path), ConfigError, "is not a run directory")
    more = ["train.num_steps=20"]
    _fails(
        _trinity("pretrain", "--resume", run_dir, *more, "model.hidden_size=40"),
        CheckpointError,
        "the model wants",
    )
    _fails(
        _trinity("pretrain", "--resume", run_dir, *more, "data.sources.0.weight=2"),
        CheckpointError,
        "data fingerprint",
    )
    _fails(_trinity("generate", tmp_path, "--prompt", "x"), CheckpointError, "neither a run")
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        shard = next(checkpoint.glob("*.distcp"))
        os.truncate(shard, 100)
    _fails(
        _trinity("pretrain", "--resume", run_dir, *more),
        CheckpointError,
        "no usable checkpoint",
        "bytes instead of",
    )
    _fails(_trinity("generate", run_dir, "--prompt", "x"), CheckpointError, "bytes instead of")


def test_vocabulary_of_tokenizer_and_model_must_agree(run_dir: Path, tiny_toml: Path) -> None:
    tokenizer = f"data.tokenizer={{path='{run_dir / 'tokenizer'}'}}"
    _fails(
        _trinity("pretrain", tiny_toml, tokenizer, "model.vocab_size=300"),
        DataError,
        "entries but model.vocab_size=300",
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tiny_toml: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = _trinity(
        "pretrain", tiny_toml, "optim.adamw.lr=1e38", "schedule.warmup_steps=8",
        "checkpoint.every_steps=1", "--run-dir", run_dir,
    )  # fmt: skip
    _fails(done, TrainingError, "the step was not applied", "lower optim.muon.lr")
    assert not (run_dir / "DONE").exists()
    rows = read_metrics(run_dir, "train")
    assert [row["accepted"] for row in rows] == [True] * (len(rows) - 1) + [False]
    newest = max((run_dir / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) == rows[-2]["step"]


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(tiny_toml: Path, tmp_path: Path) -> None:
    """A file-size limit that the first checkpoint fits in and a larger one does not."""
    run_dir = tmp_path / "run"
    first = _trinity("pretrain", tiny_toml, "train.num_steps=6", "--run-dir", run_dir)
    assert first.returncode == 0, first.stderr
    kept = (run_dir / "checkpoints/latest").read_text()
    size = max(p.stat().st_size for p in (run_dir / "checkpoints").rglob("*.distcp"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, -1))"
    code = f"{limit}; from trinity.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", "--resume", str(run_dir), "train.num_steps=9"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    _fails(done, CheckpointError, "could not save step", "free space there")
    assert (run_dir / "checkpoints/latest").read_text() == kept
    assert not list((run_dir / "checkpoints").glob("tmp-*"))
    resumed = _trinity("pretrain", "--resume", run_dir, "train.num_steps=9")
    assert resumed.returncode == 0, resumed.stderr
    assert torch.tensor([r["step"] for r in read_metrics(run_dir, "train")]).equal(
        torch.arange(1, 10)
    )
