"""Going back: snapshots, which one to take, and around which data.

A spike that skipping does not cure is a matter of data and state together (PaLM, section 5.1): the
same data met from another state does no harm. So the run returns to a state well before the first
spike and never reads the rows around it again. What happens is a pure function of numbers that all
ranks share; nobody has to be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity.ckpt.staging import DiskStaging, HostStaging
from trinity.ckpt.store import discard_after, find_checkpoint
from trinity.core import job
from trinity.core.config import RewindConfig
from trinity.core.errors import TrainingError
from trinity.core.run_files import LAUNCH_PROGRESS_FILE
from trinity.parallel.precision import leave_fp8
from trinity.train.interventions import Intervention, add_intervention, read_interventions
from trinity.train.run import Run

NEARBY_WINDOWS = 10
"""Rewinds within so many windows of one another are attempts at the same trouble."""


@dataclass
class Snapshot:
    """A copy of everything a checkpoint holds."""

    step: int
    meta: dict[str, Any]
    staging: HostStaging | DiskStaging


class SnapshotRing:
    """The newest snapshots of a run, and step 0 or the resumed step as long as there is room."""

    def __init__(self, config: RewindConfig) -> None:
        self._config = config
        self.snapshots: list[Snapshot] = []
        """Oldest first."""

    def take_if_due(self, run: Run) -> bool:
        """Copy the run's state at every ``rewind.snapshot_every_steps``-th step."""
        is_due = run.step % self._config.snapshot_every_steps == 0 or not self.snapshots
        if not is_due or any(own.step == run.step for own in self.snapshots):
            return False
        if len(self.snapshots) >= self._config.num_snapshots:
            staging = self.snapshots.pop(0).staging  # its memory, or file, is used again
        elif self._config.snapshot_dir is None:
            staging = HostStaging()
        else:
            staging = DiskStaging(Path(self._config.snapshot_dir))
        staging.fill(run.tensors())
        self.snapshots.append(Snapshot(run.step, run.meta(), staging))
        return True

    def before(self, step: int) -> Snapshot | None:
        """The newest snapshot of ``step`` or earlier."""
        return next((own for own in reversed(self.snapshots) if own.step <= step), None)

    def drop_after(self, step: int) -> None:
        """Forget what was taken later than ``step``."""
        for own in self.snapshots:
            if own.step > step:
                own.staging.clear()
        self.snapshots = [own for own in self.snapshots if own.step <= step]

    @property
    def num_bytes(self) -> int:
        """Memory, or disk, that the ring holds."""
        return sum(own.staging.num_bytes for own in self.snapshots)


class Rewinder:
    """Takes snapshots and goes back to them."""

    def __init__(self, config: RewindConfig) -> None:
        self.config = config
        self.ring = SnapshotRing(config)

    def rewind(self, run: Run, reason: str, first_spike: int) -> Intervention:
        """Bring ``run`` back to before ``first_spike`` and skip the data from there to now.

        Collective. The state gone back to is on disk, and later checkpoints are gone, before this
        returns: a crash then resumes on the new path. Raises TrainingError when there is nowhere
        to go back to, or after ``rewind.max_attempts`` at the same trouble.
        """
        nearby = NEARBY_WINDOWS * self.config.window_steps
        earlier = read_interventions(run.directory)
        attempt = 1 + sum(
            own.to_step is not None and abs(own.from_step - run.step) <= nearby for own in earlier
        )
        if attempt > self.config.max_attempts:
            raise TrainingError(
                f"{reason} at step {run.step}, after {attempt - 1} rewinds nearby: giving up. The "
                "last checkpoint is from before the trouble; resume it with a lower learning rate, "
                "or skip more data (rewind.pad_steps, data.exclude_documents)"
            )
        pad = attempt * self.config.pad_steps
        first_row = run.rows_of_step(max(1, first_spike - pad))[0]
        end_row = run.rows_of_step(run.step + pad)[-1] + 1
        from_step = run.step
        self._go_back(run, first_spike, attempt * self.config.margin_steps)
        entry = Intervention(
            reason=reason,
            first_row=max(first_row, run.loader.next_row),
            end_row=end_row,
            from_step=from_step,
            to_step=run.step,
            attempt=attempt,
            out_of_fp8=self.config.fp8_fallback,
        )
        # In this order: whenever this is cut short, the run resumes from before the trouble.
        run.saved = None
        run.save()
        if run.saver is not None:
            run.saver.wait()
        discard_after(run.directory, run.step)
        add_intervention(run.directory, entry)
        run.loader.skip_rows(entry.first_row, entry.end_row)
        for stage in run.model.stages:
            leave_fp8(stage.model, entry.out_of_fp8)
        if job.is_first():  # the launcher must not take steps that were given back for a stall
            (run.directory / LAUNCH_PROGRESS_FILE).unlink(missing_ok=True)
        return entry

    def _go_back(self, run: Run, first_spike: int, margin_steps: int) -> None:
        """To the newest state with the margin; without one, to the oldest before the spike."""
        wanted, latest = first_spike - 1 - margin_steps, first_spike - 1
        snapshot = self.ring.before(wanted)
        if snapshot is None:
            if run.saver is not None:
                run.saver.wait()
            found, _ = find_checkpoint(run.directory, not_after=max(wanted, 0))
            if found is not None:
                run.restore_from(found)
                self.ring.drop_after(-1)
                return
            snapshot = next((own for own in self.ring.snapshots if own.step <= latest), None)
        if snapshot is None:
            raise TrainingError(
                f"a rewind from step {run.step} to before {first_spike} finds neither a snapshot "
                "nor a checkpoint that old; set rewind.num_snapshots higher"
            )
        run.adopt(snapshot.staging.copy_to(run.tensors()), snapshot.meta)
        self.ring.drop_after(run.step)
