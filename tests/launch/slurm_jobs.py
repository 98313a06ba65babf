"""Jobs of launch/slurm.sbatch on a local cluster, as the tests watch them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tools.ledger import ROOT
from tools.local_slurm import LocalSlurm

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Job:
    """One submitted job; its run directory and its log lie in ``root``."""

    def __init__(
        self,
        cluster: LocalSlurm,
        root: Path,
        name: str,
        arguments: Sequence[str],
        **settings: str,
    ) -> None:
        self.cluster, self.run_dir, self.log = cluster, root / name, root / f"{name}.log"
        environment = {
            **cluster.environment,
            "TRINITY_RUN_DIR": str(self.run_dir),
            "TRINITY_PYTHON": sys.executable,
            "GLOO_SOCKET_IFNAME": "lo",
            **settings,
        }
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.log}"]
        self.number = subprocess.run(
            [*command, "launch/slurm.sbatch", *arguments],
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    @property
    def text(self) -> str:
        """What the job has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> str:
        """Such as RUNNING, PENDING, COMPLETED."""
        return self.cluster.job_state(self.number)

    @property
    def step(self) -> int:
        """The last step that was made."""
        heartbeat = self.run_dir / "heartbeat"
        return int(heartbeat.read_text() or 0) if heartbeat.exists() else 0

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint."""
        return int((self.run_dir / "checkpoints/latest").read_text().strip().split("-")[1])

    def reach(self, step: int) -> None:
        """Wait until training has made ``step`` steps."""
        self.wait_for(lambda: self.step >= step or self.state in ENDED, f"step {step}", 90)
        assert self.state == "RUNNING", self.text

    def end(self) -> str:
        """Wait for the end of the job; its state."""
        self.wait_for(lambda: self.state in ENDED, "the end", 120)
        return self.state

    def wait_for(self, condition: object, what: str, timeout_s: float) -> None:
        """Wait for a condition; what the job printed is in the error when it does not come."""
        try:
            self.cluster.wait_for(condition, timeout_s, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; job {self.number} printed:\n{self.text}") from None

    def pids(self, node: str) -> list[int]:
        """Python processes of this job on a node: ranks and what started them."""
        return [process.pid for process in self._processes(node)]

    def rank_pids(self, node: str) -> list[int]:
        """The ranks among them."""
        return [process.pid for process in self._processes(node) if "RANK" in process.environ()]

    def _processes(self, node: str) -> list[psutil.Process]:
        return [
            process
            for process in self.cluster.processes(node)
            if process.environ().get("SLURM_JOB_ID") == self.number
            and Path(process.exe()).name.startswith("python")
        ]


def kill_node(cluster: LocalSlurm, node: str) -> None:
    """What a power cut does: its daemon, the daemons of its steps and all their processes die."""
    log = str(cluster.directory / f"slurmd.{node}.log")
    victims = cluster.processes(node)
    for process in psutil.process_iter():
        try:
            if process.name().startswith("slurm") and any(
                opened.path == log for opened in process.open_files()
            ):
                victims.append(process)
        except psutil.Error:
            continue
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
