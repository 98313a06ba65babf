"""Turns finished steps into the record of the run, and says what has to be done about them.

Steps are read one step late: while the device works on a step, the host reads the numbers of the
one before, so that neither waits for the other.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

from trinity.core import job
from trinity.core.alarms import AlarmWatch
from trinity.core.errors import TrainingError
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.run_files import HEARTBEAT_FILE
from trinity.core.runtime import Moment, peak_flops, peak_memory_bytes
from trinity.models.flops import train_flops_per_token
from trinity.nn.balance import max_violation
from trinity.train.corruption import Replay
from trinity.train.metrics import MetricsWriter, Reporter
from trinity.train.probes import values as probe_values
from trinity.train.run import Run
from trinity.train.step import FINITE, PendingStep, StepResult

NUM_ROWS_TOLD = 8
"""Rows of a bad step that its event lists."""


class Launched(NamedTuple):
    """A step that was queued, with what the host knew of it then."""

    step: int
    pending: PendingStep
    known: dict[str, Any]
    """Numbers that need not be waited for."""


class Trouble(NamedTuple):
    """Why the run should go back."""

    reason: str
    first_spike: int


class Journal:
    """Reads launched steps in order; writes metrics, events, alarms and the heartbeat."""

    def __init__(self, run: Run, writer: MetricsWriter, reporter: Reporter) -> None:
        self.run, self.writer, self.reporter = run, writer, reporter
        self.is_stopping = False
        """Whether a rank was asked to stop."""
        self.trouble: Trouble | None = None
        """Set when the run should go back; every rank sets it after the same step."""
        levels = {"loss_score": run.config.stability.loss_threshold} | run.config.log.alarm_levels
        self._alarms = AlarmWatch(levels=levels)
        self._waiting: list[Launched] = []
        config = run.config
        peak = peak_flops(run.device, config.train.precision)
        self._peak_flops = peak * job.world_size() if peak else None
        length = config.batch.sequence_length
        if isinstance(config, ImageRunConfig):
            length = config.tokens_of_image
        self._flops_per_token = train_flops_per_token(config.model, length)
        self._since = Moment(run.device)

    def put(self, pending: PendingStep) -> None:
        """Take the step that ``run`` has just advanced by, and read all before it."""
        run = self.run
        known = {
            **run.optimizers.learning_rates(),
            "num_tokens_seen": run.num_tokens_seen,
            "next_row": run.loader.next_row,
            "muon_exchange_bytes": run.optimizers.exchanged_bytes(),
        }
        self._waiting.append(Launched(run.step, pending, known))
        self._read(keep=1)

    def settle(self) -> None:
        """Read everything that is waiting: the run is then what its record says."""
        self._read(keep=0)

    def forget(self) -> None:
        """Drop what is waiting, and the trouble: the run has gone back."""
        self._waiting, self.trouble = [], None

    def restart_clock(self) -> None:
        """What happened since the last step (validation, saving) is no part of the next one."""
        self._since = Moment(self.run.device)

    def event(self, name: str, step: int, text: str, /, **more: Any) -> None:
        """Write a line of the journal and say it."""
        self.writer.write("event", step, {"event": name, "text": text, **more})
        self.reporter.say(f"step {step:>6}  {name}: {text}")

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Write the validation losses at ``step``: "loss", the mean, and each source's own."""
        self.writer.write("validation", step, losses)
        self._sound(step, {"kind": "validation", "step": step, **losses})
        self.reporter.say(f"step {step:>6}  validation loss {losses['loss']:.4f}")
        self.restart_clock()

    def _read(self, keep: int) -> None:
        while len(self._waiting) > keep and self.trouble is None:
            launched = self._waiting.pop(0)
            result = launched.pending.result()
            self._record(launched, result)

    def _record(self, launched: Launched, result: StepResult) -> None:
        run, step, config = self.run, launched.step, self.run.config
        step_s = launched.pending.finished.seconds_since(self._since)
        self._since = launched.pending.finished
        derived = run.watch.observe(step, result)
        values = self._values(launched, result, step_s) | derived
        every = config.log.every_steps
        if step % every == 0 or step == config.train.num_steps or not result.accepted:
            self.writer.write("train", step, values)
        self._sound(step, {"kind": "train", "step": step, **values})
        if launched.pending.reading is not None:
            read = probe_values(launched.pending.reading)
            self.writer.write("instruments", step, read)
            self._sound(step, {"kind": "instruments", "step": step, **read})
        _beat(run, step)
        self._tell(step, values)
        self.is_stopping = self.is_stopping or result.num_stopping > 0
        if launched.pending.replay is not None:
            self._replayed(step, launched.pending.replay)
        if not result.accepted:
            self._skipped(step, result)
        if config.rewind.enabled:
            reason = run.watch.rewind_reason(step, derived)
            if reason is not None:
                self.trouble = Trouble(reason, run.watch.first_spike(step))

    def _values(self, launched: Launched, result: StepResult, step_s: float) -> dict[str, Any]:
        config = self.run.config
        max_vio_L = max_violation(result.load_LE.float())
        tokens_per_s = result.num_tokens / step_s
        mfu = None
        if self._peak_flops is not None:
            mfu = tokens_per_s * self._flops_per_token / self._peak_flops
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "batch_het": result.batch_het,
            **({} if config.model.is_image else {"z": result.z}),
            "balance_loss": result.balance_loss,
            "max_vio_max": float(max_vio_L.max()) if len(max_vio_L) else 0.0,
            "max_vio_mean": float(max_vio_L.mean()) if len(max_vio_L) else 0.0,
            "clip_factor": result.clip_factor,
            "accepted": result.accepted,
            "overflow": float(not result.is_finite),
            **launched.known,
            "tokens_per_s": tokens_per_s,
            "step_s": step_s,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(self.run.device),
            "max_vio": max_vio_L.tolist(),
            **self._load(launched.step, result),
        }

    def _load(self, step: int, result: StepResult) -> dict[str, Any]:
        is_due = step % self.run.config.log.load_every_steps == 0
        if not is_due:
            return {}
        loads = {"load": result.load_LE.tolist()}
        if result.load_LUE is not None:
            loads["load_by_sigma"] = result.load_LUE.tolist()
        return loads

    def _tell(self, step: int, values: dict[str, Any]) -> None:
        mfu = f"  mfu {values['mfu']:.0%}" if values["mfu"] is not None else ""
        self.reporter.step(
            step,
            f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3f}  "
            f"maxvio {values['max_vio_max']:.2f}  {values['tokens_per_s']:,.0f} tok/s{mfu}",
        )

    def _sound(self, step: int, record: dict[str, Any]) -> None:
        for alarm in self._alarms.feed(record):
            event = alarm.event()
            text = event.pop("text")
            del event["event"]
            self.event("alarm", step, text, **event)

    def _replayed(self, step: int, replay: Replay) -> None:
        for line in replay.lines:
            self.event("replay_mismatch", step, line, verdict=replay.verdict)
        if replay.verdict == "persistent":
            raise TrainingError(
                f"step {step} gives other results each time: {replay.lines[0]}. It was not "
                "applied; resume on other machines"
            )

    def _skipped(self, step: int, result: StepResult) -> None:
        config, rewinds = self.run.config.stability, self.run.config.rewind.enabled
        if not config.skip_spikes and not rewinds:
            _refuse(result)
        rows = self.run.rows_of_step(step)
        why = "not finite" if math.isnan(result.loss_score) else f"score {result.loss_score:.1f}"
        self.event(
            "skip",
            step,
            f"not applied: loss {result.loss:.4f}, gradient norm {result.grad_norm:.4g}, {why}; "
            f"rows {rows[0]}..{rows[-1]}",
            first_row=rows[0],
            end_row=rows[-1] + 1,
        )
        in_a_row = self.run.watch.num_skipped_in_a_row(step)
        if in_a_row > config.max_skipped_in_a_row and not rewinds:
            raise TrainingError(
                f"{in_a_row} steps in a row were skipped, the last with loss {result.loss:.4f}: "
                "the run no longer learns. Resume from an earlier checkpoint with a lower learning "
                "rate, or set rewind.enabled=true"
            )


def _beat(run: Run, step: int) -> None:
    """Tell watchdogs that a step was made: the file's age and content change."""
    if job.is_first():
        with contextlib.suppress(OSError):  # a full disk; the file's age has changed all the same
            (run.directory / HEARTBEAT_FILE).write_text(f"{step}\n", encoding="utf-8")


def _refuse(result: StepResult) -> None:
    for name in FINITE:
        value = getattr(result, name)
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is {value}; the step was not applied. Resume from the last checkpoint "
                "with a lower optim.muon.lr / optim.adamw.lr or other data, or skip such steps "
                "(stability.skip_spikes=true)"
            )
