"""Validation loss on held-out documents."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trinity.core.config import Config
from trinity.data.loader import IGNORED_TARGET, Batch
from trinity.models.lm import LanguageModel
from trinity.train.step import microbatch_loss


@torch.no_grad()
def validation_loss(model: LanguageModel, batches: Iterable[Batch], config: Config) -> float:
    """Cross-entropy in nats per valid token over all batches; no z or balance term."""
    total, num_valid_tokens = 0.0, 0
    for batch in batches:
        total += float(microbatch_loss(model, batch, config).cross_entropy)
        num_valid_tokens += int((batch.targets_BS != IGNORED_TARGET).sum())
    return total / max(num_valid_tokens, 1)
