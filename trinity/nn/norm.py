"""RMSNorm and the gains of the depth-scaled sandwich."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.ops.elementwise import rms_norm


class RMSNorm(nn.Module):
    """y = gain * x / sqrt(mean(x^2) + eps), computed in fp32, returned in the dtype of x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``."""
        return rms_norm(x, self.weight, self.eps)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm of ``num_groups`` groups of channels, each by itself."""

    def __init__(self, dim: int, eps: float, num_groups: int) -> None:
        super().__init__(dim, eps)
        self.group_width = dim // num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise groups of the last dim of ``x``, which may be some of the groups only."""
        if x.shape[-1] == self.group_width:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(
            torch.unflatten(wide, -1, (-1, self.group_width)), (self.group_width,), None, self.eps
        )
        return (normed.flatten(-2) * self.weight).to(x.dtype)


def post_norm_gain(num_layers: int) -> float:
    """Initial gain 1/sqrt(L) of the norms that close a branch (report, eqs. 34-35).

    The same in every layer. The norms that open a branch start at 1.
    """
    return num_layers**-0.5
