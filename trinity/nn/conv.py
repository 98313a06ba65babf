"""The short causal convolution in front of a linear-time mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trinity.ops.conv import causal_conv


class ShortConv(nn.Module):
    """Depthwise convolution over the last ``width`` tokens of a document."""

    def __init__(self, num_channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_channels, width))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None

    def forward(
        self,
        x_BSC: Tensor,
        document_ids_BS: Tensor | None = None,
        before_BwC: Tensor | None = None,
    ) -> Tensor:
        """(B, S, C) -> (B, S, C).

        ``before_BwC`` holds the ``width - 1`` tokens before the row; zeros when None.
        """
        return causal_conv(
            x_BSC,
            self.weight,
            self.bias,
            document_ids_BS=document_ids_BS,
            before_BwC=before_BwC,
        )
