"""The training loop."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from trinity.ckpt.background import BackgroundSaver
from trinity.core import job
from trinity.core.config import Config
from trinity.core.errors import TrainingError
from trinity.core.runtime import StopSignal, set_threads
from trinity.models.lm import LanguageModel
from trinity.optim.groups import parameter_table, render_table
from trinity.train.evaluate import validation_loss
from trinity.train.journal import Journal, Trouble
from trinity.train.metrics import MetricsWriter, Reporter
from trinity.train.probes import Probes
from trinity.train.profile import step_profiler
from trinity.train.rewind import Rewinder
from trinity.train.run import DONE_FILE, Run, open_run
from trinity.train.step import PendingStep, train_step


def pretrain(config: Config, directory: Path, device: torch.device, *, resume: bool = False) -> Run:
    """Train to ``train.num_steps``, or until SIGTERM/SIGUSR1; returns the run where it stopped.

    Every process of the job calls it; the first keeps the record and talks. A signal to one of them
    stops all after the same step.
    ``run.step < train.num_steps`` in the result means that a signal stopped it; its state is saved.
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
    with StopSignal().installed() as stop, writer, reporter, profiler as trace, saver as run.saver:
        journal = Journal(run, writer, reporter)
        probes = Probes(run.model, run.optimizers)
        rewinder = Rewinder(config.rewind) if config.rewind.enabled else None
        _begin(run, journal)
        while run.step < last_step and not journal.is_stopping:
            if rewinder is not None:
                rewinder.ring.take_if_due(run)
            journal.put(_launch(run, probes, stopping=bool(stop)))
            trace.step()
            _record_saves(run, writer)
            if _needs_settled(run):
                journal.settle()
            if journal.trouble is not None and rewinder is not None:
                _go_back(run, journal, rewinder, probes, journal.trouble)
                continue
            if _is_due(config.train.validate_every_steps, run.step, last_step):
                _validate(run, journal)
            if _is_due(config.checkpoint.every_steps, run.step, last_step):
                run.save()
                journal.restart_clock()
        journal.settle()
        saved = run.save()
        if run.saver is not None:
            run.saver.wait()
        _record_saves(run, writer)
        if journal.is_stopping:
            reason = "another rank" if stop.received is None else stop.received.name
            journal.event("stopped", run.step, f"{reason}: saved {saved}, stopping")
    job.barrier()
    if run.step == last_step and job.is_first():
        (directory / DONE_FILE).write_text(f"{run.step}\n", encoding="utf-8")
    return run


def _begin(run: Run, journal: Journal) -> None:
    for warning in run.warnings:
        journal.event("checkpoint_rejected", run.step, warning)
    if run.step > 0:
        journal.event("resumed", run.step, f"from {run.saved}")
        return
    whole = LanguageModel.on_meta(run.config.model).named_parameters()
    journal.reporter.show(render_table(parameter_table(whole, run.config.optim)))
    journal.event("started", 0, run.describe_rank())
    if run.config.train.validate_every_steps:
        _validate(run, journal)


def _launch(run: Run, probes: Probes, *, stopping: bool) -> PendingStep:
    """Queue the next step and count it."""
    every = run.config.log.instruments_every_steps
    is_read = every > 0 and (run.step + 1) % every == 0
    pending = train_step(
        run.model,
        run.optimizers,
        run.next_microbatches(),
        run.config,
        judge=run.judge,
        probes=probes if is_read else None,
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


def _record_saves(run: Run, writer: MetricsWriter) -> None:
    """Log checkpoints that were published since; on every rank, or a failed save raises on none."""
    for done in run.saver.poll() if run.saver is not None else []:
        writer.write("checkpoint", done.step, done.times._asdict())


def _is_due(every_steps: int, step: int, last_step: int) -> bool:
    """Whether something done every so many steps (0: never) and at the end happens now."""
    return every_steps > 0 and (step % every_steps == 0 or step == last_step)


def _validate(run: Run, journal: Journal) -> None:
    losses = {name: validation_loss(run.model, batches) for name, batches in run.validation.items()}
    mean = sum(losses.values()) / len(losses)
    journal.validated(run.step, {"loss": mean, **losses})
