"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from trinity.ckpt.background import BackgroundSaver
from trinity.core import job
from trinity.core.config import RunConfig
from trinity.core.errors import TrainingError
from trinity.core.run_files import DONE_FILE
from trinity.core.runtime import StopSignal, set_threads
from trinity.models.build import model_on_meta
from trinity.optim.groups import parameter_table, render_table
from trinity.train.corruption import replica_mismatches
from trinity.train.evaluate import validation_loss
from trinity.train.journal import Journal, Trouble
from trinity.train.lock import RunLock
from trinity.train.metrics import MetricsWriter, Reporter
from trinity.train.probes import Probes
from trinity.train.profile import step_profiler
from trinity.train.rewind import Rewinder
from trinity.train.run import Run, open_run
from trinity.train.saving import Saving
from trinity.train.step import PendingStep, train_step
from trinity.train.watchdog import FIRST_STEP, OTHER_WORK, Watchdog


def pretrain(
    config: RunConfig,
    directory: Path,
    device: torch.device,
    *,
    resume: bool = False,
    lock: RunLock | None = None,
) -> Run:
    """Train to ``train.num_steps``, or until SIGTERM/SIGUSR1; returns the run where it stopped.

    Every process of the job calls it; the first keeps the record and talks. A signal to one of them
    stops all after the same step.
    ``run.step < train.num_steps`` in the result means that a signal stopped it; its state is saved.
    ``lock`` is the first process's, on the directory. A checkpoint that cannot be written is told
    and tried again; raises CheckpointError at the end when the last one could not be.
    """
    set_threads(config.train.num_threads)
    run = open_run(config, directory, device, resume=resume)
    last_step = config.train.num_steps
    quiet = not job.is_first()
    writer = MetricsWriter(
        directory, start_step=run.step, tensorboard=config.log.tensorboard, quiet=quiet
    )
    profiler = step_profiler(directory, 0 if quiet else config.train.profile_steps)
    reporter = Reporter(num_steps=last_step, start_step=run.step, quiet=quiet)
    saver = BackgroundSaver() if config.checkpoint.asynchronous else contextlib.nullcontext()
    watchdog = Watchdog(directory, config.train.hang_s)
    with (
        StopSignal().installed() as stop,
        watchdog,
        writer,
        reporter,
        profiler as trace,
        saver as run.saver,
    ):
        journal = Journal(run, writer, reporter)
        saving = Saving(
            run,
            lock,
            saved=lambda done: writer.write("checkpoint", done.step, done.times._asdict()),
            failed=lambda step, why: journal.event(
                "checkpoint_failed", step, f"training goes on: {why}"
            ),
        )
        _train(run, journal, saving, watchdog, stop, trace.step)
    job.barrier()
    if run.step == last_step and job.is_first():
        _mark_done(run)
    return run


def _train(
    run: Run,
    journal: Journal,
    saving: Saving,
    watchdog: Watchdog,
    stop: StopSignal,
    trace: Callable[[], object],
) -> None:
    """From where the run stands to the last step, or to a signal; the last state is on disk."""
    config, last_step = run.config, run.config.train.num_steps
    times = FIRST_STEP
    probes = Probes(run.model, run.optimizers)
    rewinder = Rewinder(config.rewind) if config.rewind.enabled else None
    _begin(run, journal)
    while run.step < last_step and not journal.is_stopping:
        if rewinder is not None:
            rewinder.ring.take_if_due(run)
        watchdog.doing(f"step {run.step + 1}", run.step, times)
        times = 1.0
        journal.put(_launch(run, probes, stopping=bool(stop)))
        trace()
        saving.collect()
        if _needs_settled(run):
            journal.settle()
        if journal.trouble is not None and rewinder is not None:
            watchdog.doing(f"rewind at step {run.step}", run.step, OTHER_WORK)
            saving.collect(wait=True)
            _go_back(run, journal, rewinder, probes, journal.trouble)
            continue
        watchdog.doing(f"validation or save after step {run.step}", run.step, OTHER_WORK)
        if _is_due(config.stability.replicas_every_steps, run.step):
            _compare_replicas(run, journal)
        if _is_due(config.train.validate_every_steps, run.step, last_step):
            _validate(run, journal)
        if _is_due(config.checkpoint.every_steps, run.step, last_step):
            saving.save()
            journal.restart_clock()
    journal.settle()
    saving.finish()
    if rewinder is not None:
        rewinder.ring.drop_after(-1)
    if run.step == last_step:
        journal.event("finished", last_step, f"saved {run.saved}")
    elif journal.is_stopping:
        reason = "another rank" if stop.received is None else stop.received.name
        journal.event("stopped", run.step, f"{reason}: saved {run.saved}, stopping")


def _begin(run: Run, journal: Journal) -> None:
    for warning in run.warnings:
        journal.event("checkpoint_rejected", run.step, warning)
    if run.step > 0:
        if job.is_first():
            run.keep_config()
        journal.event("resumed", run.step, f"from {run.saved}")
        return
    whole = model_on_meta(run.config.model).named_parameters()
    journal.reporter.show(render_table(parameter_table(whole, run.config.optim)))
    journal.event("started", 0, run.describe_rank())
    if run.config.train.validate_every_steps:
        _validate(run, journal)


def _mark_done(run: Run) -> None:
    path = run.directory / DONE_FILE
    try:
        path.write_text(f"{run.step}\n", encoding="utf-8")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TrainingError(
            f"all steps are done and saved, but {path} cannot be written: {error}; free space and "
            "resume, or launchers will go on restarting the run"
        ) from None


def _launch(run: Run, probes: Probes, *, stopping: bool) -> PendingStep:
    """Queue the next step and count it."""
    is_read = _is_due(run.config.log.instruments_every_steps, run.step + 1)
    pending = train_step(
        run.model,
        run.optimizers,
        run.next_microbatches(),
        run.config,
        after_update=run.follow_weights,
        judge=run.judge,
        probes=probes if is_read else None,
        replaying=_is_due(run.config.stability.replay_every_steps, run.step + 1),
        stopping=stopping,
    )
    run.advance(pending.num_tokens)
    return pending


def _needs_settled(run: Run) -> bool:
    """Whether what comes after this step must know all about it."""
    config, last_step = run.config, run.config.train.num_steps
    snapshots = config.rewind.snapshot_every_steps if config.rewind.enabled else 0
    return run.step == last_step or any(
        _is_due(every, run.step, last_step)
        for every in (config.train.validate_every_steps, config.checkpoint.every_steps, snapshots)
    )


def _go_back(
    run: Run, journal: Journal, rewinder: Rewinder, probes: Probes, trouble: Trouble
) -> None:
    try:
        done = rewinder.rewind(run, trouble.reason, trouble.first_spike)
    except TrainingError as error:
        journal.event("gave_up", run.step, str(error))
        raise
    journal.forget()
    probes.forget()
    journal.event(
        "rewind",
        done.from_step,
        f"{done.reason}: back to step {done.to_step}, skipping rows {done.first_row}.."
        f"{done.end_row - 1} (attempt {done.attempt})",
        **done.model_dump(include={"to_step", "first_row", "end_row", "attempt", "reason"}),
    )
    if done.out_of_fp8:
        journal.event("fp8_fallback", run.step, f"out of FP8: {', '.join(done.out_of_fp8)}")
    journal.restart_clock()


def _compare_replicas(run: Run, journal: Journal) -> None:
    lines = replica_mismatches(run.model)
    for line in lines:
        journal.event("replica_mismatch", run.step, line)
    if lines:
        raise TrainingError(
            f"copies of the same weights differ at step {run.step}: {lines[0]}. Resume from a "
            "checkpoint before it, without the host that holds the odd one"
        )


def _is_due(every_steps: int, step: int, last_step: int = -1) -> bool:
    """Whether something done every so many steps (0: never) and at the end happens now."""
    return every_steps > 0 and (step % every_steps == 0 or step == last_step)


def _validate(run: Run, journal: Journal) -> None:
    losses = {name: validation_loss(run.model, batches) for name, batches in run.validation.items()}
    mean = sum(losses.values()) / len(losses)
    journal.validated(run.step, {"loss": mean, **losses})
