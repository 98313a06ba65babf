"""Activation recompute, applied to a model's blocks from outside."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

RecomputeMode = Literal["none", "selective", "full"]

# What is dear to compute and cheap to keep; everything else is computed again.
KEPT_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)


def apply_recompute(blocks: nn.ModuleList, mode: RecomputeMode) -> None:
    """Make every block keep its input only ("full") or also its products ("selective").

    The bound ``forward`` of each block is replaced, so parameter names stay as they are. The
    forward pass has no side effects (routing counts are returned), so running it twice counts
    nothing twice.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in KEPT_OPS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
