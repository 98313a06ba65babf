"""Our Triton kernels behind the contracts of the operations; imported when they are first used.

They are what "auto" picks on CUDA devices. Head widths of 16, 32, 64 and 128, convolutions of 2 to
4 taps, no fp64: docs/kernels.md says more. Here layouts and numbers of documents are translated and
refusals become :class:`trinity.core.errors.ConfigError`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.common import not_traced
from trinity.ops.scan_inputs import ScanInputs, runs_of

CONV_WIDTHS = (2, 3, 4)
"""Taps of the convolutions there are kernels for."""


def triton_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """See :func:`trinity.ops.scan.scan`; power 1 (arXiv 2405.21060) and 2 (arXiv 2602.17363).

    Raises:
        ConfigError: no Triton, no device for it, or a shape without a kernel.
    """
    tokens = (inputs.q, inputs.k, inputs.v, inputs.log_decay)
    shared = {
        "scale": inputs.scale,
        "document_ids_BS": _documents(inputs.document_ids),
        "initial_state": inputs.initial_state,
    }
    with _kernels("scan", 'backend="chunked"') as kernels:
        if inputs.power == 1:
            return kernels.first_order_scan(*tokens, **shared)
        return kernels.second_order_scan(
            *tokens,
            normalize=inputs.normalize,
            return_final_state=inputs.return_state,
            **shared,
        )


@not_traced
def triton_forgetting_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    log_decay_BGS: Tensor,
    document_ids_BS: Tensor | None,
) -> Tensor:
    """See :func:`trinity.ops.attention.forgetting_attention` (arXiv 2602.17363, section 6).

    Raises:
        ConfigError: as ``triton_scan``, and for keys before the first query.
    """
    if q_BHSd.shape[2] != k_BGSd.shape[2]:
        raise ConfigError(
            f"the triton kernel of forgetting attention has no keys before the first query "
            f'({k_BGSd.shape[2]} for {q_BHSd.shape[2]} queries); use backend="blocked" there'
        )
    tokens = (x.transpose(1, 2) for x in (q_BHSd, k_BGSd, v_BGSd, log_decay_BGS))
    with _kernels("forgetting attention", 'backend="blocked"') as kernels:
        out_BSHd = kernels.forgetting_attention(
            *tokens, scale=q_BHSd.shape[-1] ** -0.5, document_ids_BS=_documents(document_ids_BS)
        )
    return out_BSHd.transpose(1, 2)


@not_traced
def triton_causal_conv(
    x_BSC: Tensor,
    weight_Cw: Tensor,
    bias_C: Tensor | None,
    document_ids_BS: Tensor | None,
    before_BwC: Tensor | None,
) -> Tensor:
    """See :func:`trinity.ops.conv.causal_conv`.

    Raises:
        ConfigError: as ``triton_scan``.
    """
    with _kernels("convolution", 'backend="torch"') as kernels:
        return kernels.causal_conv(
            x_BSC,
            weight_Cw,
            bias_C,
            document_ids_BS=_documents(document_ids_BS),
            initial_BwC=before_BwC,
        )


def has_conv_kernel(x_BSC: Tensor, width: int) -> bool:
    """Whether "auto" takes the kernel for a convolution of ``width`` taps."""
    return x_BSC.is_cuda and width in CONV_WIDTHS and x_BSC.dtype != torch.float64


def _documents(document_ids_BS: Tensor | None) -> Tensor | None:
    """The kernels want numbers that do not fall; ours is a new document at every change."""
    return None if document_ids_BS is None else runs_of(document_ids_BS)


@contextlib.contextmanager
def _kernels(what: str, otherwise: str) -> Iterator[ModuleType]:
    """The kernels, whose refusals name the operation and the way around."""
    kernels = importlib.import_module("trinity_kernels")
    try:
        yield kernels
    except (kernels.KernelsUnavailableError, ValueError) as error:
        message = str(error).rstrip(".")
        raise ConfigError(f"triton {what}: {message}; otherwise use {otherwise}") from error
