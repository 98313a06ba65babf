"""The batch script on a real Slurm of two nodes: killed, preempted, requeued, the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.ledger import ROOT, train
from tools.local_slurm import LocalSlurm, missing_programs
from tools.ranks import on_ranks
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.train.metrics import read_metrics
from trinity.train.run import create_run_directory

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing_programs()), reason="slurm-wlm and munge are not installed"),
]
NUM_STEPS = 60
GRACE_S = 30
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[LocalSlurm]:
    with LocalSlurm(root / "cluster", num_nodes=2, grace_s=GRACE_S) as cluster:
        yield cluster


def _overrides(root: Path) -> list[str]:
    return [
        f"train.num_steps={NUM_STEPS}",
        "train.precision=fp32",
        "checkpoint.every_steps=10",
        "parallel.ep=2",
        f"data.cache_dir={root / 'cache'}",
    ]


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> list[float]:
    """The losses of the same two ranks without Slurm and without faults."""
    config: Config = load_config(ROOT / "configs/ledger.toml", _overrides(root))
    create_run_directory(root / "undisturbed", config)
    return on_ranks(2, _train_all, config, root / "undisturbed")[0]


def _train_all(config: Config, directory: Path) -> list[float]:
    return train(config, directory, NUM_STEPS, resume=False)[0]


class _Job:
    def __init__(self, cluster: LocalSlurm, root: Path, name: str, **settings: str) -> None:
        self.cluster, self.run_dir, self.log = cluster, root / name, root / f"{name}.log"
        environment = {
            **cluster.environment,
            "TRINITY_RUN_DIR": str(self.run_dir),
            "TRINITY_PYTHON": sys.executable,
            "GLOO_SOCKET_IFNAME": "lo",
            **settings,
        }
        self.number = subprocess.run(
            [
                *("sbatch", "--parsable", "--nodes=2", f"--output={self.log}"),
                *("launch/slurm.sbatch", "configs/ledger.toml", *_overrides(root)),
            ],
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    def reach(self, step: int) -> None:
        """Wait until training has made ``step`` steps."""
        heartbeat = self.run_dir / "heartbeat"
        self.cluster.wait_for(
            lambda: (
                (heartbeat.exists() and int(heartbeat.read_text() or 0) >= step)
                or self.cluster.job_state(self.number) in ENDED
            ),
            60,
            f"step {step}\n{self.text()}",
        )
        assert self.cluster.job_state(self.number) == "RUNNING", self.text()

    def finish(self) -> list[float]:
        """Wait for the end of the job; the losses of all steps."""
        self.cluster.wait_for(
            lambda: self.cluster.job_state(self.number) in ENDED, 120, f"the end\n{self.text()}"
        )
        assert self.cluster.job_state(self.number) == "COMPLETED", self.text()
        assert (self.run_dir / "DONE").read_text() == f"{NUM_STEPS}\n"
        rows = read_metrics(self.run_dir, "train")
        assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
        return [row["loss"] for row in rows]

    def text(self) -> str:
        """What the job has printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def test_a_node_whose_processes_die_costs_only_the_steps_since_the_checkpoint(
    cluster: LocalSlurm, root: Path, undisturbed: list[float]
) -> None:
    job = _Job(cluster, root, "killed")
    job.reach(15)
    assert {"n1", "n2"} <= {process.environ()["SLURMD_NODENAME"] for process in cluster.processes()}
    for process in cluster.processes("n2"):
        os.kill(process.pid, signal.SIGKILL)
    assert job.finish() == undisturbed
    text = job.text()
    assert "preflight: 2 ranks" in text
    assert text.count("fit") >= 1
    assert "requeue at step" in text
    assert "attempt 1" in text
    record = json.loads((job.run_dir / "run.json").read_text())
    assert record["world_size"] == 2


def test_preemption_saves_within_the_grace_time_and_goes_on_later(
    cluster: LocalSlurm, root: Path, undisturbed: list[float]
) -> None:
    job = _Job(cluster, root, "preempted", TRINITY_PREFLIGHT="0")
    job.reach(15)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null"]
    cluster.call("sbatch", *urgent)
    cluster.wait_for(lambda: "saved" in job.text(), GRACE_S, f"the save\n{job.text()}")
    latest = (job.run_dir / "checkpoints/latest").read_text().strip()
    stopped_at = int(latest.removeprefix("step-"))
    assert 15 <= stopped_at < NUM_STEPS
    assert job.finish() == undisturbed
    text = job.text()
    assert "TERM: save and stop" in text or "SIGTERM: saved" in text
    assert f"requeue at step {stopped_at}" in text


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_and_the_job_goes_on(
    cluster: LocalSlurm, root: Path, undisturbed: list[float]
) -> None:
    job = _Job(cluster, root, "hung", TRINITY_PREFLIGHT="0", TRINITY_HANG_S="8")
    job.reach(15)
    workers = [p for p in cluster.processes("n2") if "RANK" in p.environ()]
    assert workers
    for process in workers:
        process.suspend()
    assert job.finish() == undisturbed
    assert "ending the step" in job.text()
    assert "hung" in job.text()


@pytest.mark.slow
def test_one_task_per_rank_without_torchrun(
    cluster: LocalSlurm, root: Path, undisturbed: list[float]
) -> None:
    job = _Job(cluster, root, "tasks", TRINITY_LAUNCHER="srun")
    assert job.finish() == undisturbed
    assert "preflight: 2 ranks" in job.text()


@pytest.mark.slow
def test_a_job_that_never_makes_a_step_gives_up(cluster: LocalSlurm, root: Path) -> None:
    job = _Job(cluster, root, "broken", TRINITY_PREFLIGHT="0", TRINITY_RANKS_PER_NODE="3")
    cluster.wait_for(lambda: cluster.job_state(job.number) in ENDED, 200, job.text())
    assert cluster.job_state(job.number) == "FAILED"
    assert "giving up: 2 requeues without a step beyond 0" in job.text()
    assert "cannot be sharded evenly over 3 ranks" in job.text()
