"""The batch script under faults, with a stand-in for the trainer that starts at once.

Real Slurm, two nodes, one rank on each, started by srun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.slurm_jobs import Job, kill_node
from tools.ledger import ROOT
from tools.local_slurm import LocalSlurm

pytestmark = pytest.mark.slurm
NUM_STEPS = 60
SUM_OF_STEPS = str(NUM_STEPS * (NUM_STEPS + 1) // 2)


def _submit(cluster: LocalSlurm, root: Path, name: str, *overrides: str, **settings: str) -> Job:
    defaults = {
        "TRINITY_COMMAND": f"{sys.executable} {ROOT / 'tests/launch/stand_in.py'}",
        "TRINITY_LAUNCH": "srun",
        "TRINITY_PREFLIGHT": "0",
    }
    arguments = ["CONFIG", f"steps={NUM_STEPS}", *overrides]
    return Job(cluster, root, name, arguments, **defaults | settings)


def test_a_rank_that_hangs_is_ended_and_the_job_goes_on(
    cluster: LocalSlurm, slurm_root: Path
) -> None:
    job = _submit(cluster, slurm_root, "hung", TRINITY_HANG_S="4")
    job.reach(15)
    (pid,) = job.rank_pids("n2")
    os.kill(pid, signal.SIGSTOP)
    assert job.end() == "COMPLETED", job.text
    assert "no step for" in job.text
    assert "hung at step" in job.text
    # Python said where both ranks were.
    assert job.text.count("Fatal Python error: Aborted") == 2
    assert "stand_in.py" in job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


def test_the_time_limit_saves_and_requeues(cluster: LocalSlurm, slurm_root: Path) -> None:
    job = _submit(cluster, slurm_root, "limit")
    job.reach(12)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: "requeue after attempt 0" in job.text, "the requeue", 30)
    saved = job.saved_step
    assert saved == job.step
    assert f"saved step {saved}: time limit" in job.text
    assert job.end() == "COMPLETED", job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


def test_a_save_that_never_comes_is_given_up(cluster: LocalSlurm, slurm_root: Path) -> None:
    job = _submit(cluster, slurm_root, "stuck", TRINITY_SAVE_S="3")
    job.reach(15)
    (pid,) = job.rank_pids("n1")
    os.kill(pid, signal.SIGSTOP)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED", job.text
    assert "did not save within 3 s" in job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


def test_requeues_that_save_nothing_new_come_to_an_end(
    cluster: LocalSlurm, slurm_root: Path
) -> None:
    job = _submit(cluster, slurm_root, "stalled", "fail_at=15", TRINITY_MAX_STALLS="1")
    assert job.end() == "FAILED", job.text
    assert job.saved_step == 10
    assert "requeue after attempt 0, saved step 10" in job.text
    assert "1 requeues have not saved anything beyond step 10" in job.text
    assert "attempt 2" not in job.text


def test_what_fails_before_its_first_step_is_not_tried_again(
    cluster: LocalSlurm, slurm_root: Path
) -> None:
    job = _submit(cluster, slurm_root, "mistake", "steps=none")
    assert job.end() == "FAILED", job.text
    assert "giving up: the first attempt failed before its first step" in job.text
    assert "requeue after" not in job.text


def test_a_cancelled_job_stays_cancelled(cluster: LocalSlurm, slurm_root: Path) -> None:
    job = _submit(cluster, slurm_root, "cancelled", "steps=5000")
    job.reach(12)
    cluster.call("scancel", job.number)
    assert job.end() == "CANCELLED", job.text
    job.wait_for(lambda: "not asking for a requeue" in job.text, "the script's end", 30)
    job.wait_for(lambda: cluster.idle_nodes() == cluster.num_nodes, "idle nodes", 30)
    assert job.state == "CANCELLED"
    assert job.saved_step == job.step


@pytest.mark.slow
def test_torchrun_may_start_dead_ranks_again_without_a_requeue(
    cluster: LocalSlurm, slurm_root: Path
) -> None:
    settings = {"TRINITY_LAUNCH": "torchrun", "TRINITY_MAX_RESTARTS": "1"}
    job = _submit(cluster, slurm_root, "restarted", **settings)
    job.reach(15)
    (pid,) = job.rank_pids("n2")
    os.kill(pid, signal.SIGKILL)
    assert job.end() == "COMPLETED", job.text
    assert "requeue after" not in job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


@pytest.mark.slow
def test_slurm_requeues_what_outlives_the_grace_time(cluster: LocalSlurm, slurm_root: Path) -> None:
    job = _submit(cluster, slurm_root, "graceless")
    job.reach(15)
    (pid,) = job.rank_pids("n1")
    os.kill(pid, signal.SIGSTOP)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null"]
    cluster.call("sbatch", *urgent)
    job.wait_for(lambda: "attempt 1" in job.text, "the second attempt", 120)
    assert job.end() == "COMPLETED", job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_dies_costs_an_attempt(
    cluster: LocalSlurm, slurm_root: Path, node: str
) -> None:
    """The first node runs the batch script; when it dies, Slurm requeues the job by itself."""
    job = _submit(cluster, slurm_root, f"dead-{node}")
    job.reach(15)
    kill_node(cluster, node)
    job.wait_for(lambda: job.state != "RUNNING", "Slurm to notice", 120)
    cluster.start_node(node)
    assert job.end() == "COMPLETED", job.text
    assert "attempt 1" in job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS


@pytest.mark.slow
def test_a_controller_that_is_away_is_waited_for(cluster: LocalSlurm, slurm_root: Path) -> None:
    job = _submit(cluster, slurm_root, "uncontrolled", TRINITY_HANG_S="10")
    job.reach(15)
    os.kill(int((cluster.directory / "slurmctld.pid").read_text()), signal.SIGKILL)
    (pid,) = job.rank_pids("n2")
    os.kill(pid, signal.SIGKILL)
    job.wait_for(lambda: "task 1: Killed" in job.text, "srun to notice", 60)
    # srun waits for the controller, and so long nothing can be ended.
    job.wait_for(lambda: "no step for" in job.text, "the watchdog", 90)
    time.sleep(15)
    cluster.call("slurmctld")
    assert job.end() == "COMPLETED", job.text
    assert (job.run_dir / "result").read_text() == SUM_OF_STEPS
