"""A pipeline stage: the part of the model on a rank, from what it is sent to what it passes on.

Without a pipeline there is one stage, which is the whole model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trinity.core.config import ParallelConfig, RunConfig
from trinity.core.runtime import autocast
from trinity.models.staged import LossSums, StagedModel


class StepCounts(NamedTuple):
    """What the losses of one optimizer step are divided by, over all ranks and microbatches."""

    num_counted: int | Tensor
    """Tokens to predict, or images."""
    num_rows: int


class Stage(nn.Module):
    """Runs its blocks; the first takes in tokens or patches, the last forms the loss.

    FSDP2's root, so that its hooks surround the head and the loss too.
    """

    def __init__(
        self,
        model: StagedModel,
        config: RunConfig,
        *,
        index: int,
        num_stages: int,
        num_loss_ranks: int = 1,
    ) -> None:
        """``num_loss_ranks`` is how many ranks form one and the same loss."""
        super().__init__()
        self.num_loss_ranks = num_loss_ranks
        self.model = model
        self.config = config
        self.index, self.num_stages = index, num_stages
        self.counts = StepCounts(1, 1)
        self.losses: list[LossSums] = []
        """One entry per microbatch since this was last emptied, detached: this rank's share, which
        adds up over all ranks. Zeros where the loss belongs to a later stage."""

    @property
    def is_last(self) -> bool:
        """Whether the loss is formed here."""
        return self.index == self.num_stages - 1

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        """The first field of a batch, or hidden states (B, S, D) from the stage before.

        ``given`` are the other fields of the batch. Returns hidden states for the next stage, or
        the objective of this microbatch, shape (1,): its share of the step's mean loss, ready for
        the backward.
        """
        config = self.config
        with autocast(x.device, config.train.precision):
            if self.index == 0:
                x = self.model.enter(x, given)
            if not config.masks_documents:
                del given["document_ids_BS"]
            out = self.model.run_blocks(x, given)
            weight = config.balance.sequence_loss / self.counts.num_rows
            if not self.is_last:
                nothing = out.balance_loss.new_zeros(())
                self._record(LossSums(nothing, nothing, nothing, out.balance_loss, out.load_LE))
                return _with_gradient_of(out.hidden_BSD, out.balance_loss * weight)
            loss = self.model.objective(out, given, config)
        self._record(loss)
        objective = loss.total / self.counts.num_counted
        if weight:
            objective = objective + weight * loss.balance_loss
        # A pipeline cuts and joins along dim 0; a view would lose FSDP's hook.
        return torch.stack([objective])

    def _record(self, loss: LossSums) -> None:
        share = loss._replace(
            error=loss.error / self.num_loss_ranks, z=loss.z / self.num_loss_ranks
        )
        self.losses.append(LossSums(*(field.detach() for field in share)))

    def take_losses(self) -> list[LossSums]:
        """The recorded microbatches, in the order they ran; forgets them."""
        losses, self.losses = self.losses, []
        return losses


def _with_gradient_of(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, whose backward also starts the backward of the scalar ``loss``.

    What a stage adds to the objective thus needs no way to the last stage.
    """
    return _AttachLoss.apply(x, loss) if loss.requires_grad else x


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.new_ones(())
        return x.clone()  # schedules that split the backward cannot cut a view off its graph

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.like


def stages_of_rank(pp_rank: int, pp: int, config: ParallelConfig) -> list[int]:
    """Stage numbers on a pipeline rank, in the order of the model.

    Interleaved stages go round the ranks again and again; zbv and dualpipev fold the pipeline
    into a V, so that the first rank has the first stage and the last.
    """
    if pp == 1:
        return [0]
    if config.pp_schedule in ("zbv", "dualpipev"):
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + turn * pp for turn in range(config.pp_stages_per_rank)]


def layers_of_stage(num_layers: int, index: int, num_stages: int) -> range:
    """Blocks of one stage: consecutive, as even as can be.

    What comes before the blocks, and the head with the loss, count as a block each, so the first
    and the last stage get fewer blocks when the division leaves something over.
    """
    weights = [0] * num_stages
    for extra in (0, num_stages - 1):
        weights[extra] += 1 if num_layers > 2 * num_stages else 0
    counts = [0] * num_stages
    for _ in range(num_layers):
        # The lightest stage, empty ones first, the earliest of equals.
        lightest = min(range(num_stages), key=lambda s: (counts[s] > 0, counts[s] + weights[s], s))
        counts[lightest] += 1
    start = sum(counts[:index])
    return range(start, start + counts[index])


def keep_stage(model: StagedModel, index: int, num_stages: int) -> None:
    """Remove from ``model`` what other stages hold. Names stay those of the whole model."""
    mine = {str(i) for i in layers_of_stage(model.config.num_hidden_layers, index, num_stages)}
    for name in [name for name in model.backbone.layers if name not in mine]:
        del model.backbone.layers[name]
    model.drop_ends(first=index > 0, last=index < num_stages - 1)
