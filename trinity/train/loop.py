"""The training loop."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from trinity.ckpt.background import BackgroundSaver
from trinity.core import job
from trinity.core.config import Config
from trinity.core.runtime import StopSignal, peak_flops, peak_memory_bytes, set_threads
from trinity.models.flops import train_flops_per_token
from trinity.models.lm import LanguageModel
from trinity.nn.balance import max_violation
from trinity.optim.groups import parameter_table, render_table
from trinity.train.evaluate import validation_loss
from trinity.train.metrics import MetricsWriter, Reporter
from trinity.train.profile import step_profiler
from trinity.train.run import DONE_FILE, HEARTBEAT_FILE, Run, open_run
from trinity.train.step import StepResult, train_step


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
    peak = peak_flops(run.device, config.train.precision)
    profiler = step_profiler(directory, 0 if quiet else config.train.profile_steps)
    reporter = Reporter(num_steps=last_step, start_step=run.step, quiet=quiet)
    saver = BackgroundSaver() if config.checkpoint.asynchronous else contextlib.nullcontext()
    with StopSignal().installed() as stop, writer, reporter, profiler as trace, saver as run.saver:
        for warning in run.warnings:
            reporter.say(f"warning: {warning}")
        if run.step == 0:
            whole = LanguageModel.on_meta(config.model).named_parameters()
            reporter.show(render_table(parameter_table(whole, config.optim)))
            reporter.say(run.describe_rank())
        if run.step == 0 and config.train.validate_every_steps:
            _validate(run, writer, reporter)
        stopping = False
        while run.step < last_step and not stopping:
            start_s = time.perf_counter()
            result = train_step(
                run.model, run.optimizers, run.next_microbatches(), config, stopping=bool(stop)
            )
            run.advance(result.num_tokens)
            stopping = result.num_stopping > 0
            trace.step()
            _heartbeat(run)
            _record_saves(run, writer)
            _record_step(run, result, time.perf_counter() - start_s, peak, writer, reporter)
            if _is_due(config.train.validate_every_steps, run.step, last_step):
                _validate(run, writer, reporter)
            if _is_due(config.checkpoint.every_steps, run.step, last_step):
                run.save()
        saved = run.save()
        if run.saver is not None:
            run.saver.wait()
        _record_saves(run, writer)
        if stopping:
            reason = "another rank" if stop.received is None else stop.received.name
            reporter.say(f"{reason}: saved {saved}, stopping")
    job.barrier()
    if run.step == last_step and job.is_first():
        (directory / DONE_FILE).write_text(f"{run.step}\n", encoding="utf-8")
    return run


def _heartbeat(run: Run) -> None:
    """Tell watchdogs that a step was made: the file's age and content change."""
    if job.is_first():
        (run.directory / HEARTBEAT_FILE).write_text(f"{run.step}\n", encoding="utf-8")


def _record_saves(run: Run, writer: MetricsWriter) -> None:
    """Log checkpoints that were published since; on every rank, or a failed save raises on none."""
    for done in run.saver.poll() if run.saver is not None else []:
        writer.write("checkpoint", done.step, done.times._asdict())


def _is_due(every_steps: int, step: int, last_step: int) -> bool:
    """Whether something done every so many steps (0: never) and at the end happens now."""
    return every_steps > 0 and (step % every_steps == 0 or step == last_step)


def _record_step(
    run: Run,
    result: StepResult,
    step_s: float,
    peak: float | None,
    writer: MetricsWriter,
    reporter: Reporter,
) -> None:
    config = run.config
    if not _is_due(config.log.every_steps, run.step, config.train.num_steps):
        return
    tokens_per_s = result.num_tokens / step_s
    total_peak = peak * job.world_size() if peak else None
    flops_per_token = train_flops_per_token(config.model, config.batch.sequence_length)
    max_vio_L = max_violation(result.load_LE.float())
    values = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "batch_het": result.batch_het,
        "z": result.z,
        "balance_loss": result.balance_loss,
        "max_vio_max": float(max_vio_L.max()) if len(max_vio_L) else 0.0,
        "max_vio_mean": float(max_vio_L.mean()) if len(max_vio_L) else 0.0,
        **run.optimizers.learning_rates(),
        "num_tokens_seen": run.num_tokens_seen,
        "tokens_per_s": tokens_per_s,
        "step_s": step_s,
        "mfu": tokens_per_s * flops_per_token / total_peak if total_peak else None,
        "muon_exchange_bytes": run.optimizers.exchanged_bytes(),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "max_vio": max_vio_L.tolist(),
        "load": result.load_LE.tolist(),
    }
    writer.write("train", run.step, values)
    mfu = f"  mfu {values['mfu']:.0%}" if values["mfu"] is not None else ""
    reporter.step(
        run.step,
        f"loss {result.loss:.4f}  grad {result.grad_norm:.3f}  "
        f"maxvio {values['max_vio_max']:.2f}  {tokens_per_s:,.0f} tok/s{mfu}",
    )


def _validate(run: Run, writer: MetricsWriter, reporter: Reporter) -> None:
    losses = {name: validation_loss(run.model, batches) for name, batches in run.validation.items()}
    mean = sum(losses.values()) / len(losses)
    writer.write("validation", run.step, {"loss": mean, **losses})
    reporter.say(f"step {run.step:>6}  validation loss {mean:.4f}")
