"""Activation recompute, applied to a model's blocks from outside."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

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


def apply_recompute(blocks: Iterable[nn.Module], mode: RecomputeMode) -> None:
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
                context_fn=_keep_products,
            )


def _keep_products() -> tuple[_Keep, _Replay]:
    """What surrounds the forward and its replay.

    PyTorch's own selective checkpointing counts every operation, and takes those of FSDP2's hooks
    on modules inside the block, which differ in the replay, for a mistake.
    """
    kept: dict[Any, list[_Kept]] = defaultdict(list)
    return _Keep(kept), _Replay(kept)


class _Kept(NamedTuple):
    """A result, and the versions its tensors had: it must not be written to afterwards."""

    tensors: Any
    versions: list[int]


class _Mode(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code goes on being compiled inside; what it computes is not seen here."""
        return True


class _Keep(_Mode):
    """Remembers the results of ``KEPT_OPS`` in the order they are made."""

    def __init__(self, kept: dict[Any, list[_Kept]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in KEPT_OPS:
            # Detached: autograd is about to make the result itself part of its graph.
            tensors = tree_map_only(Tensor, Tensor.detach, result)
            self.kept[op].append(_Kept(tensors, _versions(tensors)))
        return result


class _Replay(_Mode):
    """Hands the remembered results back, in order, as often as it is entered."""

    def __init__(self, kept: dict[Any, list[_Kept]]) -> None:
        super().__init__()
        self.kept = kept
        self.next: dict[Any, int] = {}

    def __enter__(self) -> Any:
        self.next = defaultdict(int)
        return super().__enter__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op not in KEPT_OPS:
            return op(*args, **(kwargs or {}))
        number = self.next[op]
        self.next[op] += 1
        kept = self.kept[op][number]
        assert _versions(kept.tensors) == kept.versions, f"a result of {op} was written to"
        return tree_map_only(Tensor, Tensor.detach, kept.tensors)


def _versions(tensors: Any) -> list[int]:
    return [t._version for t in tree_leaves(tensors) if isinstance(t, Tensor)]


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
