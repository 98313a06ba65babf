"""The job this process is part of: one process alone, or the ranks that a launcher started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from trinity.core.errors import ConfigError
from trinity.core.runtime import choose_device

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def joined(device: str, *, timeout_s: int) -> Iterator[torch.device]:
    """Join the process group that torchrun's environment variables describe, if there are any.

    Inside, the module's functions know rank and world size. Yields the device of this process.

    Args:
        device: ``train.device``; a GPU is chosen by LOCAL_RANK.
        timeout_s: a collective that takes longer ends the job instead of hanging forever.

    Raises ConfigError when the launcher's variables are incomplete.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield choose_device(device)
        return
    if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {missing[0]} is not; start the job "
            "with torchrun or launch/slurm.sbatch"
        )
    # Read when the first collective is called; without it nobody can tell which rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    own = choose_device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield own
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among those of the job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process speaks for the job: writes files and talks to people."""
    return rank() == 0


def is_first_of_node() -> bool:
    """Whether this process does what one process per machine has to do."""
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: T) -> T:
    """The first process's value, on all."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
