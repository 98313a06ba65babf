"""Validation loss on held-out documents or images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trinity.core.batch import AnyBatch
from trinity.parallel.model import ParallelModel, own_share


def validation_loss(model: ParallelModel, batches: Sequence[AnyBatch]) -> float:
    """What a run's loss is, over all batches; no z or balance term.

    In nats per valid token, or squared error per image.

    The batches are shared out among data-parallel ranks; every rank gets the result.
    """
    mine = own_share(batches, model.dp_rank, model.layout.dp)
    model.pipeline.forward([model.local_batch(batch) for batch in mine])
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for stage in model.stages:
        for loss in stage.take_losses():
            total += loss.error.double()
    num_counted = sum(int(batch.num_counted) for batch in batches)
    return float(model.add_up(total)) / max(num_counted, 1)
