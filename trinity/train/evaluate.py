"""Validation loss on held-out documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trinity.core.batch import IGNORED_TARGET, Batch
from trinity.parallel.model import ParallelModel, own_share


def validation_loss(model: ParallelModel, batches: Sequence[Batch]) -> float:
    """Cross-entropy in nats per valid token over all batches; no z or balance term.

    The batches are shared out among data-parallel ranks; every rank gets the result.
    """
    mine = own_share(batches, model.dp_rank, model.layout.dp)
    model.pipeline.forward([model.local_batch(batch) for batch in mine])
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for stage in model.stages:
        for loss in stage.take_losses():
            total += loss.cross_entropy.double() / model.layout.tp
    num_valid_tokens = sum(int((b.targets_BS != IGNORED_TARGET).sum()) for b in batches)
    return float(model.add_up(total)) / max(num_valid_tokens, 1)
