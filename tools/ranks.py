"""Runs a function on several gloo ranks of this machine, forked after torch was imported.

Forking takes a tenth of a second, spawning takes seconds per rank.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG: no rank outlives a killed test run."""


class RankError(Exception):
    """A rank raised, died or did not answer in time; the text has its traceback."""


def on_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """``work(*args)`` on every rank of a new process group; the results, by rank.

    Results travel through a pipe and must be picklable. Raises RankError when a rank fails; the
    others are ended then.
    """
    context = mp.get_context("fork")
    results: Any = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_enter, args=(rank, world_size, port, work, args, results))
        for rank in range(world_size)
    ]
    sys.stdout.flush()
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(processes: list[Any], results: Any, deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(processes):
        try:
            rank, failed, value = results.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(processes))) - answers.keys())
                raise RankError(f"ranks {missing} did not answer in time") from None
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead and results.empty():
                raise RankError(f"a rank died with exit status {dead[0]}") from None
            continue
        if failed:
            raise RankError(f"rank {rank}:\n{value}")
        answers[rank] = value
    return [answers[rank] for rank in range(len(processes))]


def _enter(
    rank: int,
    world_size: int,
    port: int,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    results: Any,
) -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    # Rows of threads on two cores only wait for one another.
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    failed, value = False, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        value = work(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
        failed, value = True, traceback.format_exc()
    results.put((rank, failed, value))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
