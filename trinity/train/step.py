"""One optimizer step: microbatches in, moved parameters and a handful of numbers out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.batch import AnyBatch
from trinity.core.config import RunConfig
from trinity.core.errors import TrainingError
from trinity.core.runtime import Moment
from trinity.models.backbone import load_shape
from trinity.optim.clip import clip_gradients, square_sum
from trinity.optim.groups import OptimizerSet
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts
from trinity.train.balancing import move_biases
from trinity.train.corruption import Replay, replay_mismatches
from trinity.train.probes import Probes, Reading
from trinity.train.stability import Judge, Verdict


class StepResult(NamedTuple):
    """Means over the whole step and all ranks, as Python numbers, and the load of the experts."""

    loss: float
    """Cross-entropy, nats per valid token; or mean squared error of an image's velocity."""
    z: float
    """Mean squared logsumexp of the logits."""
    balance_loss: float
    """Sequence-wise balance loss per row, summed over layers; 1 per layer is perfect."""
    grad_norm: float
    """Global norm before clipping."""
    batch_het: float
    """Largest microbatch loss minus the mean of them (report, eq. 40), nats; over all ranks."""
    clip_factor: float
    """What gradients were multiplied by."""
    loss_score: float
    """Robust standard deviations of the loss above its recent median."""
    grad_score: float
    """The same of the logarithm of the gradient norm."""
    accepted: bool
    """Whether the step was applied."""
    is_calm: bool
    """Whether it was finite, and no spike."""
    num_stopping: int
    """Ranks that were asked to stop; the same number on every rank."""
    num_tokens: int
    """Tokens that went through the model, predicted or not."""
    load_LE: Tensor
    """Tokens per expert of every layer with experts, over the whole step."""
    load_LUE: Tensor | None = None
    """The same for each range of noise levels, of images."""

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are that must be."""
        return all(math.isfinite(getattr(self, name)) for name in FINITE)


FINITE = ("loss", "z", "balance_loss", "grad_norm")
"""Of the numbers of a step, those that must be finite for it to be applied."""
NUMBERS = (
    "loss",
    "z",
    "balance_loss",
    "grad_norm",
    "batch_het",
    "clip_factor",
    "loss_score",
    "grad_score",
    "accepted",
    "is_calm",
    "num_stopping",
    "num_counted",
)
"""What of a step travels to the host in one tensor."""


class PendingStep(NamedTuple):
    """A step whose work is queued: on a GPU it may not have begun."""

    numbers: Tensor
    """``NUMBERS`` in their order; fp64, on the host."""
    load: Tensor
    """(L, E), or (L, buckets, E)."""
    num_tokens: int
    finished: Moment
    """When the step is done and its numbers are on the host."""
    reading: Reading | None
    """Of the instruments, where they were read."""
    replay: Replay | None
    """What doing the step again has shown, where that was done."""

    def result(self) -> StepResult:
        """Wait for the numbers. Raises TrainingError if the step had nothing to predict."""
        self.finished.wait()
        numbers = dict(zip(NUMBERS, self.numbers.tolist(), strict=True))
        if numbers.pop("num_counted") == 0:
            raise TrainingError("a step has nothing to predict; documents of one token only?")
        flags = {name: bool(numbers.pop(name)) for name in ("accepted", "is_calm")}
        num_stopping = int(numbers.pop("num_stopping"))
        return StepResult(
            **numbers,
            **flags,
            num_stopping=num_stopping,
            num_tokens=self.num_tokens,
            load_LE=self.load.sum(1) if self.load.ndim == 3 else self.load,
            load_LUE=self.load if self.load.ndim == 3 else None,
        )


def train_step(
    model: ParallelModel,
    optimizers: OptimizerSet,
    microbatches: Sequence[AnyBatch],
    config: RunConfig,
    *,
    after_update: Callable[[Tensor], None] | None = None,
    judge: Judge | None = None,
    probes: Probes | None = None,
    replaying: bool = False,
    stopping: bool = False,
) -> PendingStep:
    """Accumulate gradients over ``microbatches`` and move parameters and balancing biases once.

    Every microbatch's loss sum is divided by the number of valid tokens (or images) of the *whole*
    step, over all ranks, known before the first backward, so that the split into microbatches and
    ranks changes nothing. Two sums over all ranks frame the step: these counts before, everything
    else after. The host waits for nothing: what has to be decided is decided on the device, the
    same on every rank, and read from the result when it has arrived.

    Args:
        after_update: called when parameters have moved, or not: with a boolean scalar that says it.
        judge: judges the step; None accepts whatever is finite.
        probes: read the dearer instruments of this step.
        replaying: pass forward and backward again, to see whether the same comes out.
        stopping: tells the others that this rank was asked to stop.

    Nothing moves in a step that is not accepted: neither parameters nor optimizer state nor biases.
    """
    with probes.arriving() if probes is not None else contextlib.nullcontext():
        valid_MR = num_counted(model, microbatches)
    num_rows = sum(len(batch[0]) for batch in microbatches) * model.layout.dp
    row_tokens = microbatches[0][0].shape[1] * model.layout.cp
    counts = StepCounts(valid_MR.sum(), num_rows)
    optimizers.zero_grad()
    with probes.measuring() if probes is not None else contextlib.nullcontext():
        model.pipeline.forward_backward(microbatches, counts)
    replay = replay_mismatches(model, microbatches, counts) if replaying else None
    if probes is not None:
        probes.before_update()
    sums = _sum_over_ranks(model, valid_MR.shape[0], stopping)
    numbers = _means(sums, valid_MR, num_rows)
    judge = judge or Judge(config.stability, config.optim, model.device)
    verdict = _judged(numbers, judge, replay)
    numbers["clip_factor"] = _update(model, optimizers, sums, verdict)
    if after_update is not None:
        after_update(verdict.accept)
    if probes is not None:
        probes.after_update()
    numbers |= _judgement(verdict)
    numbers |= {"num_stopping": sums.num_stopping, "num_counted": valid_MR.sum()}
    reading = probes.reading() if probes is not None else None
    return _sent_to_host(numbers, sums.load, num_rows * row_tokens, reading, replay)


class _Sums(NamedTuple):
    """Sums over all ranks; M microbatches, R data-parallel ranks."""

    z: Tensor
    balance_loss: Tensor
    grad_square: Tensor
    num_stopping: Tensor
    error_MR: Tensor
    load: Tensor
    """(L, E), or (L, buckets, E)."""

    @property
    def norm(self) -> Tensor:
        """Of the whole gradient."""
        return self.grad_square.sqrt()

    @property
    def whole_load(self) -> Tensor:
        """Over all noise levels, (L, E)."""
        return self.load.sum(1) if self.load.ndim == 3 else self.load


def _judged(numbers: dict[str, Tensor], judge: Judge, replay: Replay | None) -> Verdict:
    # A zero of the other terms: what is not finite in them is not finite in the sum.
    others = 0.0 * (numbers["z"] + numbers["balance_loss"])
    verdict = judge.verdict(numbers["loss"] + others, numbers["grad_norm"])
    if replay is not None and replay.spoils_step:
        return verdict._replace(accept=torch.zeros_like(verdict.accept))
    return verdict


def _judgement(verdict: Verdict) -> dict[str, Tensor]:
    return {
        "loss_score": verdict.loss_score,
        "grad_score": verdict.norm_score,
        "accepted": verdict.accept,
        "is_calm": verdict.is_calm,
    }


def _update(
    model: ParallelModel, optimizers: OptimizerSet, sums: _Sums, verdict: Verdict
) -> Tensor:
    """Clip, and move everything that a step moves, if it is accepted; returns the clip factor."""
    config, clip_factor = model.config, torch.ones_like(sums.norm)
    if config.optim.grad_clip or config.optim.clip_rule != "fixed":
        clip_factor = clip_gradients(model.parameters(), sums.norm, verdict.max_norm)
    optimizers.step(verdict.accept)
    move_biases(model.moe_rows(), sums.whole_load, config.balance, verdict.accept)
    return clip_factor


def num_counted(model: ParallelModel, microbatches: Sequence[AnyBatch]) -> Tensor:
    """Tokens to predict, or images, in each microbatch of each data-parallel rank, int64 (M, R)."""
    valid_MR = torch.zeros(
        len(microbatches), model.layout.dp, dtype=torch.int64, device=model.device
    )
    at = model.meshes.at if model.meshes is not None else None
    if at is None or (at.tp == 0 and at.pp == 0):  # of ranks that see the same tokens, one counts
        counts = [batch.num_counted for batch in microbatches]
        valid_MR[:, model.dp_rank] = torch.stack(counts)
    return model.add_up(valid_MR)


def _sum_over_ranks(model: ParallelModel, num_microbatches: int, stopping: bool) -> _Sums:
    """Everything a step has to know of other ranks, in one all-reduce of fp64 numbers.

    fp64 holds token counts up to 2^53 exactly.
    """
    shape = model.config.model
    load = torch.zeros(
        len(shape.moe_layers),
        *load_shape(shape),
        dtype=torch.float64,
        device=model.device,
    )
    error_MR = load.new_zeros(num_microbatches, model.layout.dp)
    scalars = load.new_zeros(4)
    rows = iter(model.moe_rows())
    for stage in model.stages:
        losses = stage.take_losses()
        for number, loss in enumerate(losses):
            error_MR[number, model.dp_rank] += loss.error
            scalars[0] += loss.z
            scalars[1] += loss.balance_loss
        for load_E in torch.stack([loss.load_LE for loss in losses]).sum(0):
            load[next(rows)[0]] += load_E
    scalars[2] = square_sum(model.parameters())
    scalars[3] = stopping
    parts = [scalars, error_MR.flatten(), load.flatten()]
    sums = model.add_up(torch.cat(parts)).split([part.numel() for part in parts])
    return _Sums(
        *sums[0].unbind(),
        error_MR=sums[1].view_as(error_MR),
        load=sums[2].view_as(load).long(),
    )


def _means(sums: _Sums, valid_MR: Tensor, num_rows: int) -> dict[str, Tensor]:
    """What is a mean over the whole step, and the gradient norm."""
    means = sums.error_MR / valid_MR.clamp(min=1)
    num_valid = valid_MR.sum()
    return {
        "loss": sums.error_MR.sum() / num_valid,
        "z": sums.z / num_valid,
        "balance_loss": sums.balance_loss / num_rows,
        "grad_norm": sums.norm,
        "batch_het": means.max() - means.mean(),
    }


def _sent_to_host(
    numbers: dict[str, Tensor],
    load: Tensor,
    num_tokens: int,
    reading: Reading | None,
    replay: Replay | None,
) -> PendingStep:
    flat = torch.stack([numbers[name].double() for name in NUMBERS])
    device = flat.device
    if device.type != "cpu":
        flat, load = _copied(flat), _copied(load)
    return PendingStep(flat, load, num_tokens, Moment(device), reading, replay)


def _copied(x: Tensor) -> Tensor:
    """In pinned memory, at some later time."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
