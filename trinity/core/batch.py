"""What one forward pass is given."""

from __future__ import annotations

from typing import NamedTuple

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
