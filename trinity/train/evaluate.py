"""Validation loss on held-out documents."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trinity.core.config import Config
from trinity.core.runtime import autocast
from trinity.data.loader import IGNORED_TARGET, Batch
from trinity.models.lm import LanguageModel


@torch.no_grad()
def validation_loss(model: LanguageModel, batches: Iterable[Batch], config: Config) -> float:
    """Cross-entropy in nats per valid token over all batches; no z or balance term."""
    total, num_valid_tokens = 0.0, 0
    for batch in batches:
        with autocast(batch.tokens_BS.device, config.train.precision):
            loss = model.loss(
                batch.tokens_BS,
                batch.targets_BS,
                batch.document_ids_BS if config.data.mask_documents else None,
                chunk_rows=config.loss.chunk_rows,
            )
        total += float(loss.cross_entropy)
        num_valid_tokens += int((batch.targets_BS != IGNORED_TARGET).sum())
    return total / max(num_valid_tokens, 1)
