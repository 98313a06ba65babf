"""The head: hidden states to logits, or straight to the loss."""

from __future__ import annotations

from torch import Tensor, nn

from trinity.ops.loss import VocabLoss, VocabularyShard, linear_cross_entropy


class VocabularyHead(nn.Linear):
    """A linear map to the vocabulary that can form the loss without ever forming all logits."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.shard: VocabularyShard | None = None
        """Set where this process holds only some words."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        targets_T: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        chunk_rows: int = 256,
    ) -> Tensor | VocabLoss:
        """Logits (..., V) of hidden states (..., D); with targets, loss sums of (T, D) instead."""
        if targets_T is None:
            return super().forward(x)
        return linear_cross_entropy(
            x, self.weight, targets_T, z_loss=z_loss, chunk_rows=chunk_rows, shard=self.shard
        )
