"""Activation recompute, applied to a model's blocks from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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

# What is dear to compute and cheap to keep; everything else is computed again. Products that write
# into a buffer of their caller (`out=`: attention scores, the experts of the CPU) cannot be kept:
# the replay hands back a result, it does not fill buffers.
KEPT_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._grouped_mm.default,
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

    Blocks that are to be compiled as well must have compiled forwards *before*
    (``block.forward = torch.compile(block.forward)``). The other way round the compiler meets a
    checkpoint with graph breaks inside and, without a word, compiles nothing.
    """
    if mode == "none":
        return
    for block in blocks:
        if mode == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            block.forward = partial(
                checkpoint,
                partial(_cast_afresh, block.forward),
                use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, _keep_products),
            )


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in KEPT_OPS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _cast_afresh(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``forward`` without autocast's cache of cast weights.

    The replay finds kept results by counting operations. A second forward in the same autocast
    region would find its weights already cast, its replay would not, and the counts would differ.
    """
    with _no_autocast_cache():
        return forward(*args, **kwargs)


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
