"""One optimizer step: microbatches in, moved parameters and a handful of numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.config import Config
from trinity.core.errors import TrainingError
from trinity.core.runtime import autocast
from trinity.data.loader import IGNORED_TARGET, Batch
from trinity.models.lm import LanguageModel, LMLoss
from trinity.optim.groups import OptimizerSet
from trinity.optim.schedule import clip_grad_norm
from trinity.train.balancing import move_biases


class StepResult(NamedTuple):
    """Means over the whole step, as Python numbers, and the load of the experts."""

    loss: float
    """Cross-entropy, nats per valid token."""
    z: float
    """Mean squared logsumexp of the logits."""
    balance_loss: float
    """Sequence-wise balance loss per row, summed over layers; 1 per layer is perfect."""
    grad_norm: float
    """Global norm before clipping."""
    batch_het: float
    """Largest microbatch loss minus the mean of them (report, eq. 40), nats."""
    num_tokens: int
    """Tokens that went through the model, predicted or not."""
    load_LE: Tensor
    """Tokens per expert of every layer with experts, over the whole step."""


def train_step(
    model: LanguageModel,
    optimizers: OptimizerSet,
    microbatches: Sequence[Batch],
    config: Config,
) -> StepResult:
    """Accumulate gradients over ``microbatches`` and move parameters and balancing biases once.

    Every microbatch's loss sum is divided by the number of valid tokens of the *whole* step,
    known before the first backward, so that the split into microbatches changes nothing.
    Raises TrainingError, with nothing moved, when loss or gradient norm is not finite.
    """
    num_valid_tokens = sum(int((b.targets_BS != IGNORED_TARGET).sum()) for b in microbatches)
    num_rows = sum(b.tokens_BS.shape[0] for b in microbatches)
    if num_valid_tokens == 0:
        raise TrainingError("a step has no token to predict; documents of one token only?")
    optimizers.zero_grad()
    losses = [_backward(model, batch, config, num_valid_tokens, num_rows) for batch in microbatches]
    grad_norm = clip_grad_norm(model.parameters(), config.optim.grad_clip or math.inf)
    result = _summarize(losses, microbatches, grad_norm, num_valid_tokens, num_rows)
    _require_finite(result)
    optimizers.step()
    move_biases(model, result.load_LE, config.balance)
    return result


def microbatch_loss(model: LanguageModel, batch: Batch, config: Config) -> LMLoss:
    """The model's loss sums on one batch, in the precision and with the masks of the run."""
    with autocast(batch.tokens_BS.device, config.train.precision):
        return model.loss(
            batch.tokens_BS,
            batch.targets_BS,
            batch.document_ids_BS if config.data.mask_documents else None,
            z_loss=config.loss.z_loss,
            chunk_rows=config.loss.chunk_rows,
        )


def _backward(
    model: LanguageModel, batch: Batch, config: Config, num_valid_tokens: int, num_rows: int
) -> LMLoss:
    loss = microbatch_loss(model, batch, config)
    objective = loss.total / num_valid_tokens
    if config.balance.sequence_loss:
        objective = objective + config.balance.sequence_loss * loss.balance_loss / num_rows
    objective.backward()
    return LMLoss(*(field.detach() for field in loss))


def _summarize(
    losses: Sequence[LMLoss],
    microbatches: Sequence[Batch],
    grad_norm: Tensor,
    num_valid_tokens: int,
    num_rows: int,
) -> StepResult:
    means = torch.stack(
        [
            loss.cross_entropy / (batch.targets_BS != IGNORED_TARGET).sum().clamp(min=1)
            for loss, batch in zip(losses, microbatches, strict=True)
        ]
    )
    return StepResult(
        loss=float(sum(loss.cross_entropy for loss in losses)) / num_valid_tokens,
        z=float(sum(loss.z for loss in losses)) / num_valid_tokens,
        balance_loss=float(sum(loss.balance_loss for loss in losses)) / num_rows,
        grad_norm=float(grad_norm),
        batch_het=float(means.max() - means.mean()),
        num_tokens=sum(batch.tokens_BS.numel() for batch in microbatches),
        load_LE=torch.stack([loss.load_LE for loss in losses]).sum(0),
    )


def _require_finite(result: StepResult) -> None:
    for name in ("loss", "z", "balance_loss", "grad_norm"):
        value = getattr(result, name)
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} is {value}; the step was not applied. Resume from the last checkpoint "
                "with a lower optim.muon.lr / optim.adamw.lr or other data"
            )
