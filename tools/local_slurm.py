"""A real Slurm on one machine, for trying launch scripts: munged, slurmctld and N slurmd.

    python -m tools.local_slurm DIRECTORY --nodes 2     # runs until Ctrl-C; prints what to export

Needs the Debian packages slurm-wlm and munge. Everything lies in DIRECTORY, everything listens on
loopback, and only processes of this cluster are ever ended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The default life of a credential, 120 s, would delay every requeue by as much.
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
PropagateResourceLimits=NONE
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
WaitTime=5
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
PartitionName=main Nodes=n[1-{nodes}] Default=YES PriorityTier=1 GraceTime={grace_s}
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if _which(name) is None]


class LocalSlurm:
    """A cluster of ``num_nodes`` nodes named n1, n2, ... that all are this machine."""

    def __init__(self, directory: Path, *, num_nodes: int = 2, grace_s: int = 30) -> None:
        self.directory = directory.resolve()
        self.num_nodes = num_nodes
        self.grace_s = grace_s

    @property
    def environment(self) -> dict[str, str]:
        """What commands need to find this cluster."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def __enter__(self) -> LocalSlurm:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("state", *(f"spool.n{i + 1}" for i in range(self.num_nodes))):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        self._write_conf()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key": key.name, "socket": "munge.sock", "pid": "munged.pid", "log": "munged.log"}
        self.call(
            "munged",
            "--force",
            f"--key-file={self.directory / files['key']}",
            f"--socket={self.directory / files['socket']}",
            f"--pid-file={self.directory / files['pid']}",
            f"--log-file={self.directory / files['log']}",
            f"--seed-file={self.directory / 'munged.seed'}",
        )
        self.call("slurmctld")
        for number in range(self.num_nodes):
            self.start_node(f"n{number + 1}")
        self.wait_for(lambda: self.idle_nodes() == self.num_nodes, 30, "nodes to be idle")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, or start it again."""
        self.call("slurmd", "-N", node)

    def idle_nodes(self) -> int:
        """Nodes that wait for work."""
        return len(self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split())

    def stop(self) -> None:
        """Cancel all jobs and end all daemons of this cluster."""
        jobs = self.call("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.call("scancel", *sorted(set(jobs)), check=False)
        processes = [*self._daemons(), *self.processes()]
        for process in processes:
            _send(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=3)
        for process in alive:
            _send(process, signal.SIGKILL)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Processes of tasks and batch scripts that run on a node, or on all nodes."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                continue
            where = environment.get("SLURMD_NODENAME")
            if where is not None and node in (None, where):
                found.append(process)
        return found

    def call(self, program: str, *arguments: str, check: bool = True) -> str:
        """Run a program of Slurm; its output."""
        done = subprocess.run(
            [_which(program) or program, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def job_state(self, number: str) -> str:
        """Such as RUNNING, PENDING, COMPLETED. Asked of the controller: `sbatch --wait` is slow."""
        text = self.call("scontrol", "show", "job", number)
        return text.split("JobState=")[1].split()[0]

    def wait_for(self, condition: object, timeout_s: float, what: str) -> None:
        """Poll until ``condition()`` is true. Raises TimeoutError naming ``what``."""
        assert callable(condition)
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"waited {timeout_s} s for {what}")
            time.sleep(0.2)

    def _daemons(self) -> Iterator[psutil.Process]:
        for path in self.directory.glob("*.pid"):
            text = path.read_text().strip()
            if text and psutil.pid_exists(int(text)):
                yield psutil.Process(int(text))

    def _write_conf(self) -> None:
        port = _free_ports(self.num_nodes + 1)
        host = socket.gethostname().split(".")[0]
        text = CONF.format(
            host=host,
            port=port,
            user=psutil.Process().username(),
            dir=self.directory,
            nodes=self.num_nodes,
            grace_s=self.grace_s,
        )
        for i in range(self.num_nodes):
            text += (
                f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.{i + 2} "
                f"Port={port + i + 1} CPUs=4 RealMemory=4000\n"
            )
        (self.directory / "slurm.conf").write_text(text)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that nobody listens on."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        taken = [port for port in range(first, first + count) if _is_taken(port)]
        if not taken:
            return first
    raise RuntimeError("no free ports")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Run a cluster until interrupted."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    if missing := missing_programs():
        raise SystemExit(f"{missing[0]} is not installed; apt-get install slurm-wlm munge")
    with LocalSlurm(options.directory, num_nodes=options.nodes) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
