"""Attempts of a run that faults may happen to: forked from a process that has imported all.

An attempt is what a launcher starts: ``trinity pretrain ARGUMENTS`` on one or more ranks, each a
process of its own with its own log. It takes a second where starting Python takes several.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tools.ranks import DIE_WITH_PARENT
from trinity.ckpt.manifest import verify_manifest
from trinity.ckpt.store import checkpoint_path, list_checkpoints, load_tensors, stored_names
from trinity.cli import main
from trinity.train.metrics import read_metrics
from trinity.train.run import Run

FORK = mp.get_context("fork")
TIMEOUT_S = 120
TIMING_KEYS = {
    *("time", "tokens_per_s", "step_s", "mfu", "peak_memory_bytes"),
    *("straggler", "straggler_rank", "rank_ms"),
}
SMALLEST = [
    *("model.num_hidden_layers=2", "model.global_attn_every_n_layers=2", "batch.rows_per_step=2"),
    *(
        "batch.microbatch_rows=1",
        "batch.sequence_length=32",
        "log.tensorboard=false",
        "train.validate_every_steps=0",
    ),
    *("schedule.decay_steps=0", "schedule.warmup_steps=0", "schedule.shape=constant"),
]
"""Overrides that leave a step of a few milliseconds."""


class Attempt:
    """The processes of one attempt."""

    def __init__(
        self,
        log: Path,
        arguments: Sequence[str | Path],
        *,
        world_size: int = 1,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Start it. ``before`` runs in each rank's process first, to arrange a fault."""
        self.logs = [log.with_name(f"{log.name}-{rank}") for rank in range(world_size)]
        self._arguments, self._before = list(map(str, arguments)), before
        port = _free_port()
        sys.stdout.flush()
        self.processes: list[Any] = [
            FORK.Process(target=self._enter, args=(rank, world_size, port))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def _enter(self, rank: int, world_size: int, port: int) -> None:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        log = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        if world_size > 1:
            os.environ |= {
                **{"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                "GLOO_SOCKET_IFNAME": "lo",
            }
        sys.argv = ["trinity", "pretrain", *self._arguments]
        status: object = 1
        try:
            if self._before is not None:
                self._before(rank)
            main()
        except SystemExit as end:
            status = end.code
        except BaseException:  # noqa: BLE001 - as the interpreter does
            import traceback

            traceback.print_exc()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to a rank, if it still runs."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def wait(self, rank: int = 0) -> int:
        """Exit status of a rank, negative for a signal; kills all that are left after a while."""
        self.processes[rank].join(TIMEOUT_S)
        status = self.processes[rank].exitcode
        if status is None:
            self.kill()
            raise TimeoutError(f"rank {rank} did not end:\n{self.log(rank)}")
        return status

    def statuses(self) -> list[int]:
        """Exit statuses of all ranks."""
        return [self.wait(rank) for rank in range(len(self.processes))]

    def kill(self) -> None:
        """End all ranks at once, as a power cut does."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def log(self, rank: int = 0) -> str:
        """What a rank printed."""
        return self.logs[rank].read_text()


def at_step(step: int, action: Callable[[], object], *, settled: bool = False) -> None:
    """Do something before the step after ``step``, in this process; once.

    ``settled``: when nothing is being written in the background.
    """
    plain, done = Run.next_microbatches, []

    def next_microbatches(run: Run) -> Any:
        if run.step >= step and not done:
            done.append(step)
            if settled and run.saver is not None and run.saver._writing is not None:
                wait([run.saver._writing])
            action()
        return plain(run)

    Run.next_microbatches = next_microbatches


def run_to_end(log: Path, arguments: Sequence[str | Path], **options: Any) -> Attempt:
    """An attempt that must finish."""
    attempt = Attempt(log, arguments, **options)
    statuses = attempt.statuses()
    assert not any(statuses), f"{statuses}\n{attempt.log()}"
    return attempt


def step_of(run_dir: Path) -> int:
    """The last finished step, from the heartbeat; 0 before the first."""
    try:
        return int((run_dir / "heartbeat").read_text() or 0)
    except FileNotFoundError:
        return 0


def reach(attempt: Attempt, run_dir: Path, step: int) -> None:
    """Wait until a run has made ``step``."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while step_of(run_dir) < step:
        assert attempt.processes[0].is_alive(), attempt.log()
        assert time.monotonic() < deadline_s, attempt.log()
        time.sleep(0.002)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Every number of every step but the times, as text: NaN is not equal to itself."""
    rows = [row for row in read_metrics(run_dir) if row["kind"] in ("train", "validation")]
    return [{k: json.dumps(v) for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The events of one name."""
    return [row for row in read_metrics(run_dir, "event") if row["event"] == name]


def assert_sound(run_dir: Path) -> None:
    """Every published checkpoint is what its manifest says."""
    for path in list_checkpoints(run_dir):
        verify_manifest(path)


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, optimizers, data position, generators."""
    path = checkpoint_path(run_dir, step)
    verify_manifest(path)
    return load_tensors(path, stored_names(path))


def assert_same_state(first: Path, second: Path, step: int) -> None:
    """Two runs have equal checkpoints of ``step``, bit for bit."""
    ours, theirs = state(first, step), state(second, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, theirs[name])]
        assert torch.equal(*bits), name  # as bytes: NaN is not equal to itself


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


for _module in ("trinity.train.command", "torch.distributed.checkpoint", "trinity.train.watchdog"):
    importlib.import_module(_module)  # once, for all that are forked
