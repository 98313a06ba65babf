"""`trinity pretrain` on a real Slurm of two nodes: killed, preempted, requeued, the same result."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import GRACE_S
from tests.launch.slurm_jobs import Job
from tools.ledger import ROOT, train
from tools.local_slurm import LocalSlurm
from tools.ranks import on_ranks
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.train.metrics import read_metrics
from trinity.train.run import create_run_directory

pytestmark = pytest.mark.slurm
NUM_STEPS = 26


def _overrides(root: Path) -> list[str]:
    return [
        f"train.num_steps={NUM_STEPS}",
        "train.precision=fp32",
        "checkpoint.every_steps=10",
        "parallel.ep=2",
        f"data.cache_dir={root / 'cache'}",
    ]


@pytest.fixture(scope="module")
def undisturbed(slurm_root: Path) -> list[float]:
    """The losses of the same two ranks without Slurm and without faults."""
    config: Config = load_config(ROOT / "configs/ledger.toml", _overrides(slurm_root))
    create_run_directory(slurm_root / "undisturbed", config)
    return on_ranks(2, _train_all, config, slurm_root / "undisturbed")[0]


def _train_all(config: Config, directory: Path) -> list[float]:
    return train(config, directory, NUM_STEPS, resume=False)[0]


def _submit(cluster: LocalSlurm, root: Path, name: str, **settings: str) -> Job:
    return Job(cluster, root, name, ["configs/ledger.toml", *_overrides(root)], **settings)


def _losses(job: Job) -> list[float]:
    """Of a job that finished, one for each step."""
    assert job.end() == "COMPLETED", job.text
    assert (job.run_dir / "DONE").read_text() == f"{NUM_STEPS}\n"
    rows = read_metrics(job.run_dir, "train")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [row["loss"] for row in rows]


def test_a_node_whose_processes_die_costs_only_the_steps_since_the_checkpoint(
    cluster: LocalSlurm, slurm_root: Path, undisturbed: list[float]
) -> None:
    job = _submit(cluster, slurm_root, "killed")
    job.reach(12)
    victims = job.pids("n2")
    assert len(victims) == 2  # torchrun and a rank
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert _losses(job) == undisturbed
    assert job.text.count("preflight: 2 ranks on 2 nodes") == 2
    assert job.text.count("fit\n") == 2
    assert "requeue after attempt 0, saved step 10: status" in job.text
    record = json.loads((job.run_dir / "run.json").read_text())
    assert record["world_size"] == 2


def test_preemption_saves_within_the_grace_time_and_goes_on_later(
    cluster: LocalSlurm, slurm_root: Path, undisturbed: list[float]
) -> None:
    """With a task per rank instead of torchrun."""
    job = _submit(cluster, slurm_root, "preempted", TRINITY_PREFLIGHT="0", TRINITY_LAUNCH="srun")
    job.reach(12)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null"]
    cluster.call("sbatch", *urgent)
    job.wait_for(lambda: "requeue after attempt 0" in job.text, "the save", GRACE_S)
    saved = job.saved_step
    assert 12 <= saved < NUM_STEPS
    assert f"requeue after attempt 0, saved step {saved}: preempted" in job.text
    assert _losses(job) == undisturbed


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_and_the_job_goes_on(
    cluster: LocalSlurm, slurm_root: Path, undisturbed: list[float]
) -> None:
    settings = {"TRINITY_PREFLIGHT": "0", "TRINITY_HANG_S": "8"}
    job = _submit(cluster, slurm_root, "hung-trainer", **settings)
    job.reach(12)
    (pid,) = job.rank_pids("n2")
    os.kill(pid, signal.SIGSTOP)
    assert _losses(job) == undisturbed
    assert "hung at step" in job.text
    # Where the rank was that waited for the other one.
    assert "train_step" in job.text


@pytest.mark.slow
def test_one_task_per_rank_without_torchrun(
    cluster: LocalSlurm, slurm_root: Path, undisturbed: list[float]
) -> None:
    job = _submit(cluster, slurm_root, "tasks", TRINITY_LAUNCH="srun")
    assert _losses(job) == undisturbed
    assert "preflight: 2 ranks on 2 nodes" in job.text


@pytest.mark.slow
def test_a_mistake_in_the_configuration_is_not_tried_again(
    cluster: LocalSlurm, slurm_root: Path
) -> None:
    settings = {"TRINITY_PREFLIGHT": "0", "TRINITY_RANKS_PER_NODE": "3"}
    job = _submit(cluster, slurm_root, "broken", **settings)
    assert job.end() == "FAILED"
    assert "giving up: the first attempt failed before its first step" in job.text
    assert "cannot be sharded evenly over 3 ranks; raise parallel.ep" in job.text
