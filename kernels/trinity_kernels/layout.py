"""Who shares what among the heads, and the checks every entrance makes.

Letters: ``B`` batch, ``S`` positions, ``H`` query heads, ``G`` key heads, ``V`` state heads (those
of the values and decays), ``d`` width of queries and keys, ``e`` width of values, ``N`` chunks,
``C`` positions of a chunk (in ``causal_conv``: channels), ``w`` taps.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
"""Tiles span a whole head, so its width is a power of two that a matrix unit takes."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONV_WIDTHS = (2, 3, 4)
PRECISIONS = ("ieee", "tf32", "tf32x3")


class Heads(NamedTuple):
    """How output head h finds its query, key and state.

    query head = h // per_key, state head = h // per_state, key head = state head // per_key.
    One of the two ratios is 1.
    """

    num_queries: int
    num_keys: int
    num_states: int
    per_state: int
    """Output heads that read one state (grouped queries)."""
    per_key: int
    """State heads that share one query and key head (groups of Mamba-2)."""

    @property
    def num_outputs(self) -> int:
        """Heads of the output."""
        return max(self.num_queries, self.num_states)


def heads_of(num_queries: int, num_keys: int, num_states: int) -> Heads:
    """The head layout of a scan.

    Raises:
        ValueError: neither H is a multiple of G = V, nor V a multiple of G = H.
    """
    if num_keys == num_states and num_queries % num_keys == 0:
        return Heads(num_queries, num_keys, num_states, num_queries // num_keys, 1)
    if num_queries == num_keys and num_states % num_keys == 0:
        return Heads(num_queries, num_keys, num_states, 1, num_states // num_keys)
    raise ValueError(
        f"{num_queries} query, {num_keys} key and {num_states} value heads do not fit: query heads "
        "must be a multiple of equally many key and value heads, or value heads a multiple of "
        "equally many query and key heads"
    )


def check_tokens(name: str, tensor: Tensor, like: Tensor, num_dims: int) -> None:
    """Same batch, positions and device as ``like``, and a dtype that the kernels read."""
    if tensor.dim() != num_dims or tensor.shape[:2] != like.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {num_dims} dims that begin with "
            f"{tuple(like.shape[:2])}"
        )
    if tensor.shape[1] == 0 or tensor.shape[0] == 0:
        raise ValueError(f"{name} is empty: {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}")


def check_width(name: str, tensor: Tensor, *, widths: tuple[int, ...] = HEAD_DIMS) -> None:
    """Head width and dtype are ones the tiles are written for."""
    if tensor.shape[-1] not in widths:
        raise ValueError(f"{name} has head dim {tensor.shape[-1]}; kernels exist for {widths}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; kernels read {DTYPES}")


def check_scan(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    document_ids_BS: Tensor | None,
) -> Heads:
    """All that can be wrong with the tokens of a scan, said before a kernel starts.

    Raises:
        ValueError: a shape, dtype, device or head layout that does not fit.
    """
    for name, tensor, num_dims in (
        ("q", q_BSHd, 4),
        ("k", k_BSGd, 4),
        ("v", v_BSVe, 4),
        ("log_decay", log_decay_BSV, 3),
    ):
        check_tokens(name, tensor, q_BSHd, num_dims)
    for name, tensor in (("q", q_BSHd), ("k", k_BSGd), ("v", v_BSVe)):
        check_width(name, tensor)
    if q_BSHd.shape[3] != k_BSGd.shape[3]:
        raise ValueError(f"q has head dim {q_BSHd.shape[3]}, k {k_BSGd.shape[3]}; they must agree")
    if log_decay_BSV.shape[2] != v_BSVe.shape[2]:
        raise ValueError(f"{log_decay_BSV.shape[2]} decays for {v_BSVe.shape[2]} value heads")
    if document_ids_BS is not None:
        check_tokens("document_ids", document_ids_BS, q_BSHd, 2)
    return heads_of(q_BSHd.shape[2], k_BSGd.shape[2], v_BSVe.shape[2])


def check_state(initial_state: Tensor | None, shape: tuple[int, ...]) -> None:
    """An initial state has exactly the shape of a final state."""
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {shape}")


def check_conv(
    x_BSC: Tensor,
    weight_Cw: Tensor,
    bias_C: Tensor | None,
    document_ids_BS: Tensor | None,
    initial_BwC: Tensor | None,
) -> None:
    """All that can be wrong with the inputs of a causal convolution.

    Raises:
        ValueError: a shape, dtype, device or number of taps that does not fit.
    """
    check_tokens("x", x_BSC, x_BSC, 3)
    batch, _, num_channels = x_BSC.shape
    if weight_Cw.dim() != 2 or weight_Cw.shape[1] not in CONV_WIDTHS:
        raise ValueError(f"weight has shape {tuple(weight_Cw.shape)}, expected (C, 2..4)")
    expected = {
        "weight": (weight_Cw, (num_channels, weight_Cw.shape[1])),
        "bias": (bias_C, (num_channels,)),
        "initial": (initial_BwC, (batch, weight_Cw.shape[1] - 1, num_channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x_BSC.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x_BSC.device}")
    for name, tensor in {"x": x_BSC, "weight": weight_Cw}.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; kernels read {DTYPES}")
    if document_ids_BS is not None:
        check_tokens("document_ids", document_ids_BS, x_BSC, 2)


def matmul_precision(precision: str | None, *tensors: Tensor) -> str:
    """The precision of fp32 tile products: "ieee" where any input is fp32, else "tf32".

    Raises:
        ValueError: not one of ``PRECISIONS``.
    """
    if precision is None:
        return "ieee" if any(t.dtype == torch.float32 for t in tensors) else "tf32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} does not exist; use one of {PRECISIONS}")
    return precision


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current CUDA device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def num_tiles(size: int, tile: int) -> int:
    """How many tiles cover ``size``."""
    return -(-size // tile)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    """kernel[grid](...) as a call. Triton's types refuse plain numbers for constants."""
    kernel[grid](*arguments, **options)
