"""What one forward pass is given.

The first field of a batch is what the first stage of the model takes in; the others are known to
every stage. All are tensors with one entry per row.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Target of a position that predicts nothing."""


class Batch(NamedTuple):
    """Rows of tokens, what to predict, and which document each position belongs to."""

    tokens_BS: Tensor
    """int64."""
    targets_BS: Tensor
    """int64; the next token of the same document, or -100 where the document ends."""
    document_ids_BS: Tensor
    """int32; 0, 1, 2, ... along the row, one per contiguous read of a document. Always covers the
    whole row, also where context parallelism leaves a rank only a part of the tokens."""

    @property
    def num_counted(self) -> Tensor:
        """Tokens to predict: what the sum of the losses is divided by."""
        return (self.targets_BS != IGNORED_TARGET).sum()

    def without_targets(self) -> Self:
        """The same rows, with nothing to predict."""
        return self._replace(targets_BS=torch.full_like(self.targets_BS, IGNORED_TARGET))

    def part_of_rows(self, part: int, num_parts: int) -> Self:
        """The part-th of equal consecutive parts of every row."""
        tokens_BS, targets_BS = (
            x.chunk(num_parts, 1)[part].contiguous() for x in (self.tokens_BS, self.targets_BS)
        )
        return self._replace(tokens_BS=tokens_BS, targets_BS=targets_BS)


class FlowBatch(NamedTuple):
    """Rows of patches of noisy images, and the velocities to predict.

    A row of S tokens holds up to N images, one after another; what is left over is padding. P is
    the number of values of the largest patch; smaller ones are followed by zeros.
    """

    patches_BSP: Tensor
    """Of the latents z, fp32."""
    targets_BSP: Tensor
    """Of the velocities, fp32."""
    share_BS: Tensor
    """What an element's squared error counts: 1 / elements of the image; 0 for padding. fp32."""
    weight_BS: Tensor
    """The same times the weight of the image's noise level, fp32."""
    scale_BS: Tensor
    """Which of the model's patch scales, int64."""
    coordinates_BSA: Tensor
    """Where patches stand, in base tokens: (y, x), or (t, y, x). fp32. Covers the whole row."""
    document_ids_BS: Tensor
    """int32; the number of the image in the row, N for padding. Covers the whole row."""
    sigma_BN: Tensor
    """Noise levels, fp32."""
    condition: Tensor
    """Classes (B, N), int64, or embeddings (B, N, W)."""
    counts_BN: Tensor
    """1 for an image, 0 for a place that holds none. int64."""

    @property
    def num_counted(self) -> Tensor:
        """Images: what the sum of the losses is divided by."""
        return self.counts_BN.sum()

    def without_targets(self) -> Self:
        """The same rows, with nothing to predict."""
        return self._replace(
            share_BS=torch.zeros_like(self.share_BS),
            weight_BS=torch.zeros_like(self.weight_BS),
            counts_BN=torch.zeros_like(self.counts_BN),
        )

    def part_of_rows(self, part: int, num_parts: int) -> Self:
        """The part-th of equal consecutive parts of every row. Images count in the first."""
        fields = self._asdict()
        for name in ("patches_BSP", "targets_BSP", "share_BS", "weight_BS", "scale_BS"):
            fields[name] = fields[name].chunk(num_parts, 1)[part].contiguous()
        if part > 0:
            fields["counts_BN"] = torch.zeros_like(self.counts_BN)
        return type(self)(**fields)


AnyBatch = Batch | FlowBatch
