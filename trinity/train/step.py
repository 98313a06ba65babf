"""One optimizer step: microbatches in, moved parameters and a handful of numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.batch import IGNORED_TARGET, Batch
from trinity.core.config import Config
from trinity.core.errors import TrainingError
from trinity.optim.clip import clip_gradients, square_sum
from trinity.optim.groups import OptimizerSet
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts
from trinity.train.balancing import move_biases


class StepResult(NamedTuple):
    """Means over the whole step and all ranks, as Python numbers, and the load of the experts."""

    loss: float
    """Cross-entropy, nats per valid token."""
    z: float
    """Mean squared logsumexp of the logits."""
    balance_loss: float
    """Sequence-wise balance loss per row, summed over layers; 1 per layer is perfect."""
    grad_norm: float
    """Global norm before clipping."""
    batch_het: float
    """Largest microbatch loss minus the mean of them (report, eq. 40), nats; over all ranks."""
    num_tokens: int
    """Tokens that went through the model, predicted or not."""
    load_LE: Tensor
    """Tokens per expert of every layer with experts, over the whole step."""
    num_stopping: int
    """Ranks that were asked to stop; the same number on every rank."""


def train_step(
    model: ParallelModel,
    optimizers: OptimizerSet,
    microbatches: Sequence[Batch],
    config: Config,
    *,
    stopping: bool = False,
) -> StepResult:
    """Accumulate gradients over ``microbatches`` and move parameters and balancing biases once.

    Every microbatch's loss sum is divided by the number of valid tokens of the *whole* step, over
    all ranks, known before the first backward, so that the split into microbatches and ranks
    changes nothing. Two sums over all ranks frame the step: token counts before, everything else
    after. ``stopping`` tells the others that this rank was asked to stop.

    Raises TrainingError, on every rank and with nothing moved, when loss or gradient norm is not
    finite.
    """
    valid_MR = _valid_tokens(model, microbatches)
    num_valid_tokens = int(valid_MR.sum())
    if num_valid_tokens == 0:
        raise TrainingError("a step has no token to predict; documents of one token only?")
    num_rows = sum(batch.tokens_BS.shape[0] for batch in microbatches) * model.layout.dp
    optimizers.zero_grad()
    model.pipeline.forward_backward(microbatches, StepCounts(num_valid_tokens, num_rows))
    sums = _sum_over_ranks(model, valid_MR.shape[0], stopping)
    grad_norm = sums.grad_square.sqrt()
    row_tokens = microbatches[0].tokens_BS.shape[1] * model.layout.cp
    result = _result(sums, valid_MR, grad_norm, num_rows, num_rows * row_tokens)
    _require_finite(result)
    if config.optim.grad_clip:
        clip_gradients(model.parameters(), grad_norm, config.optim.grad_clip)
    optimizers.step()
    move_biases(model.moe_rows(), result.load_LE, config.balance)
    return result


class _Sums(NamedTuple):
    """Sums over all ranks; M microbatches, R data-parallel ranks."""

    z: Tensor
    balance_loss: Tensor
    grad_square: Tensor
    num_stopping: Tensor
    cross_entropy_MR: Tensor
    load_LE: Tensor


def _valid_tokens(model: ParallelModel, microbatches: Sequence[Batch]) -> Tensor:
    """Tokens to predict in each microbatch of each data-parallel rank, int64 (M, R)."""
    valid_MR = torch.zeros(len(microbatches), model.layout.dp, dtype=torch.int64)
    at = model.meshes.at if model.meshes is not None else None
    if at is None or (at.tp == 0 and at.pp == 0):  # of ranks that see the same tokens, one counts
        counts = [(batch.targets_BS != IGNORED_TARGET).sum() for batch in microbatches]
        valid_MR[:, model.dp_rank] = torch.stack(counts).to(valid_MR.device)
    return model.add_up(valid_MR.to(model.device))


def _sum_over_ranks(model: ParallelModel, num_microbatches: int, stopping: bool) -> _Sums:
    """Everything a step has to know of other ranks, in one all-reduce of fp64 numbers.

    fp64 holds token counts up to 2^53 exactly.
    """
    shape = model.config.model
    load_LE = torch.zeros(
        len(shape.moe_layers),
        shape.num_experts,
        dtype=torch.float64,
        device=model.device,
    )
    cross_entropy_MR = load_LE.new_zeros(num_microbatches, model.layout.dp)
    scalars = load_LE.new_zeros(4)
    rows = iter(model.moe_rows())
    for stage in model.stages:
        losses = stage.take_losses()
        for number, loss in enumerate(losses):
            # All tensor-parallel ranks have the same loss, and each its own tokens' balance.
            cross_entropy_MR[number, model.dp_rank] += loss.cross_entropy / model.layout.tp
            scalars[0] += loss.z / model.layout.tp
            scalars[1] += loss.balance_loss
        for load_E in torch.stack([loss.load_LE for loss in losses]).sum(0):
            load_LE[next(rows)[0]] += load_E
    scalars[2] = square_sum(model.parameters())
    scalars[3] = stopping
    parts = [scalars, cross_entropy_MR.flatten(), load_LE.flatten()]
    sums = model.add_up(torch.cat(parts)).split([part.numel() for part in parts])
    return _Sums(
        *sums[0].unbind(),
        cross_entropy_MR=sums[1].view_as(cross_entropy_MR),
        load_LE=sums[2].view_as(load_LE).long(),
    )


def _result(
    sums: _Sums, valid_MR: Tensor, grad_norm: Tensor, num_rows: int, num_tokens: int
) -> StepResult:
    num_valid_tokens = int(valid_MR.sum())
    means = sums.cross_entropy_MR / valid_MR.clamp(min=1)
    return StepResult(
        loss=float(sums.cross_entropy_MR.sum()) / num_valid_tokens,
        z=float(sums.z) / num_valid_tokens,
        balance_loss=float(sums.balance_loss) / num_rows,
        grad_norm=float(grad_norm),
        batch_het=float(means.max() - means.mean()),
        num_tokens=num_tokens,
        load_LE=sums.load_LE,
        num_stopping=int(sums.num_stopping),
    )


def _require_finite(result: StepResult) -> None:
    for name in ("loss", "z", "balance_loss", "grad_norm"):
        value = getattr(result, name)
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is {value}; the step was not applied. Resume from the last checkpoint "
                "with a lower optim.muon.lr / optim.adamw.lr or other data"
            )
