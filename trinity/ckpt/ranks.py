"""Work that the ranks of a job do together, where a failure of one is an error on all.

``group`` is the process group to talk over, the default one where it is None. A thread beside the
training thread must bring a group of its own: two threads in one group mix their collectives up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trinity.core.errors import CheckpointError

T = TypeVar("T")


def together(
    work: Callable[[], T], failure: str, remedy: str, group: dist.ProcessGroup | None = None
) -> list[T]:
    """Do ``work`` on every rank and return all results; where one failed, every rank raises.

    Without this the ranks that did well would wait forever for the one that did not. Raises
    CheckpointError, with ``failure`` and ``remedy`` around a cause that does not bring its own.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as error:
        problem = str(error)
    # A full disk shows as OSError, as torch's "unexpected pos" RuntimeError, or wrapped by DCP.
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = cause_of(error)
        if not isinstance(cause, Exception):  # Ctrl-C, which DCP wraps too
            raise cause from None
        problem = f"{failure}: {reason_of(cause)}; {remedy}"
    try:
        outcomes = gather((result, problem), group)
    except RuntimeError as error:  # a rank died, or took longer than the group's timeout
        reason = problem or f"{failure}: lost touch with another rank: {reason_of(error)}; {remedy}"
        raise CheckpointError(reason) from None
    for _, reported in outcomes:
        if reported is not None:
            raise CheckpointError(reported)
    return [cast(T, outcome) for outcome, _ in outcomes]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every rank, on every rank."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process in the group."""
    return dist.get_rank(group) if _is_distributed() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Processes in the group."""
    return dist.get_world_size(group) if _is_distributed() else 1


def cause_of(error: BaseException) -> BaseException:
    """DCP wraps one exception for each rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(error).strip()
    if "unexpected pos" in text or "PytorchStreamWriter" in text:  # torch's words for a short write
        return "a file could not be written in full, as on a full disk"
    return text.splitlines()[0] if text else type(error).__name__


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
