"""What the hand-written autograd nodes share: dtypes, autocast, and private names of PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from trinity.core.runtime import autocast_disabled

P = ParamSpec("P")
R = TypeVar("R")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype products with ``x`` run in: its own, or autocast's inside an autocast region.

    fp64 is left alone, as autocast itself does.
    """
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def exact_dtypes(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast inside: a custom node casts once at its door and means what it says after."""
    return autocast_disabled(x.device)


def not_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep ``function`` out of compiled graphs: there it becomes a graph break and runs as it is.

    For loops whose length depends on data. ``torch.compiler.disable`` would do, but importing the
    module already costs a second with it; this loads the compiler only inside a compiled region.
    """
    opaque = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return opaque(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def scratch_bmm(a_Nmk: Tensor, b_Nkn: Tensor) -> Tensor:
    """``torch.bmm`` into new memory that selective recompute does not keep.

    For what a custom node forms on its way and may write over: kept, it would cost its memory until
    the backward, which forms it anyway.
    """
    out = a_Nmk.new_empty(a_Nmk.shape[0], a_Nmk.shape[1], b_Nkn.shape[2])
    return torch.bmm(a_Nmk, b_Nkn, out=out)


def softmax_backward_(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Replace ``grad`` by the gradient of the logits: p * (grad - sum(grad * p)), last dim."""
    return torch.ops.aten._softmax_backward_data.out(
        grad, probabilities, -1, grad.dtype, grad_input=grad
    )
