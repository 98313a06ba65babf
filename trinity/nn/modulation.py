"""Adaptive norms: how the blocks of a diffusion transformer learn noise level and condition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.ops.image_attention import Sight

NUM_MODULATIONS = 6
"""Shift, scale and gate of the mixer, then of the feed-forward."""


class Conditioning(NamedTuple):
    """What the blocks are told of the image that each token belongs to.

    Where all tokens of a row are of one image, the dim of positions has one entry.
    """

    modulation_BSMD: Tensor
    """Shared part of the six modulations, (B, S or 1, 6, D)."""
    time_BSD: Tensor
    """Embedding of the noise level alone, (B, S or 1, D): what routers see of it."""
    bucket_BS: Tensor
    """Range of sigma that a token's visit to an expert is counted in, int64; -1 for padding."""
    sight: Sight
    """Who sees whom."""

    def of_rows(self, rows_N: Tensor) -> Conditioning:
        """That of some rows of a batch whose rows are one image each, in one grid."""
        return Conditioning(
            self.modulation_BSMD[rows_N],
            self.time_BSD[rows_N],
            self.bucket_BS[rows_N],
            self.sight,
        )


class Modulation(nn.Module):
    """A block's own part of the six modulations, added to the part that all blocks share.

    Instead of a projection of 6 D x D in every block (adaLN-zero, arXiv 2212.09748), one for all
    blocks and a table of 6 x D in each, as PixArt-alpha does (arXiv 2310.00426). Both start at
    zero: every block is the identity then.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(NUM_MODULATIONS, width))

    def forward(self, shared_BSMD: Tensor) -> tuple[Tensor, ...]:
        """Six tensors (B, S or 1, D): shift, scale, gate of the mixer and of the feed-forward."""
        return (shared_BSMD + self.modulation.to(shared_BSMD.dtype)).unbind(-2)


def modulate(x_BSD: Tensor, shift_BSD: Tensor, scale_BSD: Tensor) -> Tensor:
    """x (1 + scale) + shift, in the dtype of x."""
    return torch.addcmul(shift_BSD, x_BSD, 1 + scale_BSD).to(x_BSD.dtype)
