"""Saving while training goes on.

The calling thread only copies the tensors to host memory; one thread beside it writes and publishes
the copy through :func:`trinity.ckpt.store.save_checkpoint`, with everything that promises. Under
several ranks all methods but :meth:`BackgroundSaver.close` are collective: every rank calls them,
after the same step, so that a failed save stops all ranks at the same place.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch.distributed as dist
from torch import Tensor

from trinity.ckpt.ranks import gather, together, world_size
from trinity.ckpt.staging import HostStaging
from trinity.ckpt.store import save_checkpoint, save_failure
from trinity.core.errors import CheckpointError


class SaveTimes(NamedTuple):
    """What a save cost on this rank."""

    waited_s: float
    """How long the caller was held up by the save before it."""
    staging_s: float
    """How long the caller was held up by the copy to host memory."""
    written_s: float
    """How long writing took, beside the training."""
    num_bytes: int
    """Size of the copy."""


class SavedCheckpoint(NamedTuple):
    """A checkpoint that is on disk."""

    step: int
    path: Path
    times: SaveTimes


class BackgroundSaver:
    """Saves checkpoints in a thread of its own, one at a time.

    Host memory must have room for a copy of what this rank saves; see
    :class:`~trinity.ckpt.staging.HostStaging`. Use it in a ``with``, inside the process group's
    life: leaving waits for the save in flight. A failed save raises its
    CheckpointError once, at the next :meth:`save`, :meth:`poll` or :meth:`wait`; earlier
    checkpoints are intact then, and the next save starts afresh.
    """

    def __init__(self) -> None:
        """Create the thread and, under several ranks, a gloo group of its own. Collective."""
        # The copies are on the host: they go over gloo even where training uses NCCL.
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._staging = HostStaging()
        self._writing: Future[SavedCheckpoint] | None = None
        self._latest: Path | None = None
        self._unreported: list[SavedCheckpoint] = []

    def save(
        self,
        run_dir: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        keep_last: int,
        keep_every_steps: int = 0,
        before_publish: Callable[[], None] | None = None,
    ) -> None:
        """Copy ``tensors`` and ``meta`` as they are now and start writing the copies.

        Waits for the save before, if that is not done. For the arguments see
        :func:`~trinity.ckpt.store.save_checkpoint`. Raises CheckpointError when the save before
        failed, or when there is not enough host memory on some rank; then nothing was started.
        """
        start_s = time.perf_counter()
        self.wait()
        waited_s = time.perf_counter() - start_s
        meta = copy.deepcopy(dict(meta))
        failure, _ = save_failure(run_dir, step)
        remedy = "give the job more host memory, or set checkpoint.asynchronous=false"
        together(lambda: self._staging.fill(tensors), failure, remedy, self._group)
        staging_s = time.perf_counter() - start_s - waited_s
        staged, num_bytes = self._staging.tensors, self._staging.num_bytes

        def write() -> SavedCheckpoint:
            start_s = time.perf_counter()
            path = save_checkpoint(
                run_dir,
                step,
                staged,
                meta,
                keep_last=keep_last,
                keep_every_steps=keep_every_steps,
                group=self._group,
                before_publish=before_publish,
            )
            written_s = time.perf_counter() - start_s
            times = SaveTimes(waited_s, staging_s, written_s, num_bytes)
            return SavedCheckpoint(step, path, times)

        self._writing = self._thread.submit(write)

    def poll(self) -> list[SavedCheckpoint]:
        """What was published since the last call, without waiting for what is being written.

        While a save is being written the ranks compare notes over the default group: none counts
        as done, or failed, before it is so on all of them.
        """
        if self._writing is not None and all(gather(self._writing.done())):
            self.wait()
        saved, self._unreported = self._unreported, []
        return saved

    def wait(self) -> Path | None:
        """Wait until nothing is being written; returns the newest published checkpoint."""
        if self._writing is not None:
            wait_for([self._writing])  # Ctrl-C ends this, and the save goes on
            writing, self._writing = self._writing, None
            saved = writing.result()
            self._unreported.append(saved)
            self._latest = saved.path
        return self._latest

    def close(self) -> None:
        """Wait as :meth:`wait` does, then free the thread, its group and the host memory."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.clear()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close. A failed save is only a warning where another error is on its way already."""
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)
