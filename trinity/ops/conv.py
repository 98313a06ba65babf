"""Short causal depthwise convolution over packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.scan_inputs import runs_of
from trinity.ops.triton_backends import has_conv_kernel, triton_causal_conv


def causal_conv(
    x_BSC: Tensor,
    weight_Cw: Tensor,
    bias_C: Tensor | None,
    *,
    document_ids_BS: Tensor | None = None,
    before_BwC: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = bias + sum over i of weight[:, w - 1 - i] * x_(t - i), channel by channel; (B, S, C).

    Args:
        x_BSC: inputs.
        weight_Cw: taps; the last belongs to the token itself.
        document_ids_BS: integers; no tap reads what lies before a document's start.
        before_BwC: the w - 1 tokens before the row, of its first document; zeros when None.
        backend: "torch", "triton" (2 to 4 taps), or "auto" for the fastest on this device.

    Raises:
        ConfigError: unknown backend, or one that cannot do this.
    """
    if backend == "auto":
        backend = "triton" if has_conv_kernel(x_BSC, weight_Cw.shape[1]) else "torch"
    if backend == "triton":
        return triton_causal_conv(x_BSC, weight_Cw, bias_C, document_ids_BS, before_BwC)
    if backend != "torch":
        raise ConfigError(f"convolution backend {backend!r} is not auto, torch or triton")
    width = weight_Cw.shape[1]
    weight_Cw, bias_C = (
        weight_Cw.to(x_BSC.dtype),
        None if bias_C is None else bias_C.to(x_BSC.dtype),
    )
    num_tokens = x_BSC.shape[1]
    if before_BwC is None:
        padded = F.pad(x_BSC, (0, 0, width - 1, 0))
    else:
        padded = torch.cat((before_BwC.to(x_BSC.dtype), x_BSC), dim=1)
    run_BS = None
    if document_ids_BS is not None:
        run_BS = F.pad(runs_of(document_ids_BS), (width - 1, 0))  # the first document is number 0
    y_BSC = x_BSC * weight_Cw[:, -1]
    if bias_C is not None:
        y_BSC = y_BSC + bias_C
    for back in range(1, width):
        first = width - 1 - back
        tap = padded[:, first : first + num_tokens] * weight_Cw[:, first]
        if run_BS is not None:
            same = run_BS[:, first : first + num_tokens] == run_BS[:, width - 1 :]
            tap = tap * same.unsqueeze(-1)
        y_BSC = y_BSC + tap
    return y_BSC
