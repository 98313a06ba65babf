"""launch/local.sh: a worker that dies, and a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools.ledger import ROOT
from trinity.train.metrics import read_metrics

NUM_STEPS = 40


def _start(tmp_path: Path, data_cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TRINITY_RUN_DIR": str(tmp_path / "run"),
        "TRINITY_PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [
            *("launch/local.sh", "2", "configs/ledger.toml", f"train.num_steps={NUM_STEPS}"),
            *("checkpoint.every_steps=5", f"data.cache_dir={data_cache}", "parallel.ep=2"),
        ],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _reach(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 90
    heartbeat = run_dir / "heartbeat"
    while not (heartbeat.exists() and int(heartbeat.read_text() or 0) >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "pretrain" in child.cmdline() and _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    return "RANK" in process.environ()


def test_a_worker_that_is_killed_is_restarted_from_the_last_checkpoint(
    tmp_path: Path, data_cache: Path
) -> None:
    process = _start(tmp_path, data_cache)
    _reach(tmp_path / "run", 12, process)
    workers = _workers(process)
    assert len(workers) == 2
    workers[1].kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    rows = read_metrics(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "run/DONE").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_worker_stops_all_after_the_same_step(
    tmp_path: Path, data_cache: Path, number: signal.Signals
) -> None:
    process = _start(tmp_path, data_cache)
    _reach(tmp_path / "run", 7, process)
    _workers(process)[1].send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "another rank: saved" in output or f"{number.name}: saved" in output
    latest = (tmp_path / "run/checkpoints/latest").read_text()
    assert 7 <= int(latest.removeprefix("step-")) < NUM_STEPS
    assert not (tmp_path / "run/DONE").exists()


def test_usage_is_explained() -> None:
    done = subprocess.run(["launch/local.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: launch/local.sh PROCESSES CONFIG" in done.stderr


def _stand_in(tmp_path: Path, *overrides: str, **settings: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TRINITY_RUN_DIR": str(tmp_path / "run"),
        "TRINITY_PYTHON": sys.executable,
        "TRINITY_COMMAND": f"{sys.executable} {ROOT / 'tests/launch/stand_in.py'}",
        **settings,
    }
    return subprocess.Popen(
        ["launch/local.sh", "2", "CONFIG", *overrides],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell cannot trap what was ignored before it; background jobs of scripts ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_script_saves_stops_and_goes_on_later(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = _stand_in(tmp_path, "steps=1000000")  # it does not end by itself, however slow we are
    _reach(tmp_path / "run", 12, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "SIGTERM: saved step" in output
    last = int((tmp_path / "run/heartbeat").read_text()) + 30
    again = _stand_in(tmp_path, f"steps={last}")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert (tmp_path / "run/result").read_text() == str(last * (last + 1) // 2)


def test_what_fails_every_time_is_given_up(tmp_path: Path) -> None:
    process = _stand_in(tmp_path, "fail_at=12", TRINITY_MAX_RESTARTS="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.count("failed at step 12\n") == 2
    assert "failed with status 1" in output
