"""Saving a run so that a save that fails costs a checkpoint, not the training."""

from __future__ import annotations

from collections.abc import Callable

from trinity.ckpt.background import SavedCheckpoint
from trinity.core.errors import CheckpointError
from trinity.train.lock import RunLock, require_held
from trinity.train.run import Run


class Saving:
    """Saves ``run``, says what became of it, and remembers failures.

    All methods are collective: every rank calls them after the same step, and a save that fails on
    one rank has failed on all.
    """

    def __init__(
        self,
        run: Run,
        lock: RunLock | None,
        *,
        saved: Callable[[SavedCheckpoint], None],
        failed: Callable[[int, str], None],
    ) -> None:
        """``saved`` is told what was published in the background, ``failed`` step and reason."""
        self._run, self._lock = run, lock
        self._saved, self._failed = saved, failed
        self._in_flight: int | None = None
        self._reason = ""
        run.before_publish = lock.require if lock is not None else None

    def save(self) -> None:
        """Save the current step, or start to. A failure is told, and the next save tried anew.

        Raises TrainingError when another job has taken the run directory over.
        """
        require_held(self._lock)
        for _ in range(2):
            before = self._in_flight
            try:
                self._run.save()
            except CheckpointError as error:
                self._give_up(str(error))
                if before is None:
                    return
                continue  # it was the save before that failed; nothing was started
            if self._run.saver is not None:
                self._in_flight = self._run.step
            return

    def collect(self, *, wait: bool = False) -> None:
        """Tell what was published, or failed, in the background since; with ``wait``, of all."""
        saver = self._run.saver
        if saver is None:
            return
        try:
            if wait:
                saver.wait()
            published = saver.poll()
        except CheckpointError as error:
            self._give_up(str(error))
            published = saver.poll()
        for done in published:
            self._saved(done)
            if done.step == self._in_flight:
                self._in_flight = None

    def finish(self) -> None:
        """Save the current step and wait until it is on disk; tried twice.

        Raises CheckpointError when it cannot be: the run must not look finished, nor saved.
        """
        for _ in range(2):
            self.save()
            self.collect(wait=True)
            if self._run.saved is not None:
                return
        raise CheckpointError(f"{self._reason}; the steps since are lost")

    def _give_up(self, reason: str) -> None:
        step = self._run.step if self._in_flight is None else self._in_flight
        self._in_flight = None
        if step == self._run.step:
            self._run.saved = None
        require_held(self._lock)  # or else that is the reason
        self._reason = reason
        self._failed(step, reason)
