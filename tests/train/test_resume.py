"""A run that is killed and resumed equals one that was never disturbed, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trinity
from trinity.core.runtime import SAVED_AND_STOPPED_EXIT_CODE
from trinity.train.metrics import read_metrics

TIMING_KEYS = {
    "time",
    "tokens_per_s",
    "step_s",
    "mfu",
    "peak_memory_bytes",
    "rank_ms",
    "router_drift",  # since the reading before, which a restart has not
}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trinity", "pretrain", *arguments]


def _run(*arguments: str) -> None:
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _start_and_signal(at_step: int, number: signal.Signals, run_dir: Path, *arguments: str) -> int:
    """Start a run, send it ``number`` once it has logged ``at_step``, return its exit status."""
    process = subprocess.Popen(
        _command(*arguments, "--run-dir", str(run_dir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists():
            steps = [row["step"] for row in read_metrics(run_dir, "train")]
            if steps and steps[-1] >= at_step:
                os.kill(process.pid, number)
                break
        time.sleep(0.005)
    return process.wait(timeout=60)


def _curve(run_dir: Path) -> list[dict[str, object]]:
    rows = [row for row in read_metrics(run_dir) if row["kind"] not in ("checkpoint", "event")]
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def _assert_same_run(first: Path, second: Path) -> None:
    assert _curve(first) == _curve(second)
    weights = trinity.load(first)[0].state_dict()
    others = trinity.load(second)[0].state_dict()
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture(scope="module")
def long_overrides() -> list[str]:
    return [
        "train.num_steps=40",
        "checkpoint.every_steps=7",
        "batch.ramp=[{from_step=20, rows_per_step=8}]",
    ]


@pytest.mark.parametrize("packing", ["rsdb", pytest.param("sequential", marks=pytest.mark.slow)])
def test_kill_9_at_a_random_step_then_resume(
    tiny_toml: Path, tmp_path: Path, long_overrides: list[str], packing: str
) -> None:
    overrides = [*long_overrides, f"data.packing={packing}"]
    _run(str(tiny_toml), *overrides, "--run-dir", str(tmp_path / "whole"))
    victim = tmp_path / "victim"
    at_step = random.SystemRandom().randint(8, 33)
    status = _start_and_signal(at_step, signal.SIGKILL, victim, str(tiny_toml), *overrides)
    assert status == -signal.SIGKILL, f"the run ended before it was killed, step {at_step}"
    assert not (victim / "DONE").exists()
    _run("--resume", str(victim))
    assert (victim / "DONE").exists()
    _assert_same_run(tmp_path / "whole", victim)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_the_documented_status(
    tiny_toml: Path, tmp_path: Path, long_overrides: list[str], number: signal.Signals
) -> None:
    _run(str(tiny_toml), *long_overrides, "--run-dir", str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    # With periodic saving off, whatever resume finds was written because of the signal.
    status = _start_and_signal(
        5, number, stopped, str(tiny_toml), *long_overrides, "checkpoint.every_steps=0"
    )
    assert status == SAVED_AND_STOPPED_EXIT_CODE
    _run("--resume", str(stopped))
    _assert_same_run(tmp_path / "whole", stopped)


def test_resume_falls_back_to_the_previous_checkpoint_when_the_newest_is_damaged(
    tiny_toml: Path, tmp_path: Path
) -> None:
    _run(str(tiny_toml), "--run-dir", str(tmp_path / "whole"))
    victim = tmp_path / "victim"
    _run(str(tiny_toml), "train.num_steps=8", "schedule.decay_steps=0", "--run-dir", str(victim))
    newest = max((victim / "checkpoints").glob("step-*"))
    shard = max(newest.glob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (victim / "DONE").unlink()
    # The interrupted run had another num_steps, so its schedule must be given back.
    resumed = subprocess.run(
        _command("--resume", str(victim)), capture_output=True, text=True, timeout=120
    )
    assert resumed.returncode == 0, resumed.stderr
    assert shard.name in resumed.stdout + resumed.stderr
    assert read_metrics(victim, "train")[-1]["step"] == 8
