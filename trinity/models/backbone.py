"""The stack of blocks that the language model and the diffusion transformer share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.core.config import ModelConfig
from trinity.nn.block import Block, LayerCache
from trinity.nn.norm import RMSNorm
from trinity.nn.rope import rope_tables


class BackboneOutput(NamedTuple):
    """Hidden states and, for balancing, what the routers of all layers did."""

    hidden_BSD: Tensor
    load_LE: Tensor
    """Tokens per expert for each layer with experts that is here, int64; (0, E) without any."""
    balance_loss: Tensor
    """Sequence-wise balance loss summed over rows and layers, fp32 scalar."""


class RowPart(NamedTuple):
    """Which part of each row the hidden states of this process are."""

    index: int = 0
    """This process holds the index-th of equal consecutive parts of the row (context parallel)."""
    stream_split: int = 1
    """Ways in which that part is split again between the matrices (sequence parallel)."""


class Backbone(nn.Module):
    """Blocks by ``layer_types``, then the final norm.

    A pipeline stage keeps only its own blocks, under their numbers in the whole model, and the norm
    only if it is the last.
    """

    norm: RMSNorm | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(
            {str(i): Block(config, i) for i in range(config.num_hidden_layers)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.row_part = RowPart()

    def forward(
        self,
        x_BSD: Tensor,
        document_ids_BS: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        first_position: int = 0,
    ) -> BackboneOutput:
        """Run all layers; ``first_position`` is where the row starts when caches hold its past."""
        num_positions = x_BSD.shape[1] * self.row_part.stream_split
        rope = rope_tables(
            num_positions,
            self.config.head_dim,
            self.config.rope_theta,
            x_BSD.device,
            start=first_position + self.row_part.index * num_positions,
        )
        loads: list[Tensor] = []
        balance_losses: list[Tensor] = []
        for name, layer in self.layers.items():
            cache = None if caches is None else caches[int(name)]
            x_BSD, load_E, balance_loss = layer(x_BSD, rope, document_ids_BS, cache)
            if load_E is not None:
                loads.append(load_E)
                balance_losses.append(balance_loss)
        hidden_BSD = x_BSD if self.norm is None else self.norm(x_BSD)
        if not loads:
            empty = torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=x_BSD.device)
            return BackboneOutput(hidden_BSD, empty, torch.zeros((), device=x_BSD.device))
        return BackboneOutput(hidden_BSD, torch.stack(loads), torch.stack(balance_losses).sum())
