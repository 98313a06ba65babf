"""What a run leaves behind and shows: record, metrics, TensorBoard, trace, bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trinity.core.load_config import load_config
from trinity.train.command import pretrain_command
from trinity.train.inspect import documents_of_step
from trinity.train.metrics import MetricsWriter, read_metrics


@pytest.fixture
def run_dir(tiny_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of twelve steps, with a trace and a sample; ``capsys`` holds what it printed."""
    directory = tmp_path / "run"
    overrides = ["train.profile_steps=2", "train.sample_prompt=The keeper"]
    assert pretrain_command([str(tiny_toml), *overrides], directory, None) == 0
    return directory


def test_files_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr().out
    config = load_config(run_dir / "config.toml")
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config_sha256"] == config.sha256()
    assert record["sources"][0]["content_sha256"]
    assert record["sources"][0]["shards"][0]["num_documents"] > 50
    assert (run_dir / "DONE").read_text() == "12\n"
    trace = json.loads((run_dir / "profile/trace.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])
    for part in ("parameters", "embed_tokens.weight", "validation loss", "MaxVio per expert layer"):
        assert part in printed, printed
    assert "sample:\nThe keeper" in printed
    assert f"run: {run_dir}" in printed


def test_metrics_and_tensorboard_agree(run_dir: Path) -> None:
    rows = read_metrics(run_dir, "train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    config = load_config(run_dir / "config.toml")
    routed = config.batch.rows_per_step * config.batch.sequence_length * 2
    for row in rows:
        assert len(row["max_vio"]) == 3
        assert [sum(layer) for layer in row["load"]] == [routed] * 3
        mean = routed / 4
        assert row["max_vio"] == pytest.approx([(max(x) - mean) / mean for x in row["load"]])
        assert row["batch_het"] >= 0
        assert 0 < row["mfu"] < 2
        assert math.isfinite(row["grad_norm"])
    assert rows[0]["lr_muon"] == pytest.approx(config.optim.muon.lr / 2)  # warm-up of two steps
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in rows])
    assert [row["step"] for row in read_metrics(run_dir, "validation")] == [0, 5, 10, 12]


def test_validation_falls_on_real_text(run_dir: Path) -> None:
    losses = [row["loss"] for row in read_metrics(run_dir, "validation")]
    assert losses[-1] < 0.97 * losses[0]


def test_replayed_steps_are_what_was_trained_on(run_dir: Path) -> None:
    lines = documents_of_step(run_dir, 4)
    assert {line.split(":")[0] for line in lines} == {f"row {i}" for i in range(12, 16)}


def test_a_torn_last_line_is_dropped_and_later_steps_are_cut(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsWriter(tmp_path, start_step=start, tensorboard=False) as writer:
            for step in steps:
                writer.write("train", step, {"loss": step + start / 10})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.2, 4.2]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(tiny_toml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trinity", "pretrain", str(tiny_toml), "train.num_steps=6"]
    piped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert piped.returncode == 0, piped.stderr
    assert "step      1/6  loss" in piped.stdout
    assert "\x1b[" not in piped.stdout
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "tty")], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(timeout=60) == 0
    text = shown.decode(errors="replace")
    assert "\x1b[" in text
    assert "6/6" in text
    assert "step      1/6" not in text
