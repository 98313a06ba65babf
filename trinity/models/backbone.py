"""The stack of blocks that the language model and the diffusion transformer share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.core.config import ModelConfig
from trinity.nn.attention import KeyValueCache
from trinity.nn.block import Block
from trinity.nn.norm import RMSNorm
from trinity.nn.rope import rope_tables


class BackboneOutput(NamedTuple):
    """Hidden states and, for balancing, what the routers of all layers did."""

    hidden_BSD: Tensor
    load_LE: Tensor
    """Tokens per expert for each layer with experts, int64; (0, E) without any."""
    balance_loss: Tensor
    """Sequence-wise balance loss summed over rows and layers, fp32 scalar."""


class Backbone(nn.Module):
    """Blocks by ``layer_types``, then the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        document_ids_BS: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        first_position: int = 0,
    ) -> BackboneOutput:
        """Run all layers; ``first_position`` is where the row starts when caches hold its past."""
        rope = rope_tables(
            x_BSD.shape[1],
            self.config.head_dim,
            self.config.rope_theta,
            x_BSD.device,
            start=first_position,
        )
        loads: list[Tensor] = []
        balance_losses: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x_BSD, load_E, balance_loss = layer(x_BSD, rope, document_ids_BS, cache)
            if load_E is not None:
                loads.append(load_E)
                balance_losses.append(balance_loss)
        hidden_BSD = self.norm(x_BSD)
        if not loads:
            empty = torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=x_BSD.device)
            return BackboneOutput(hidden_BSD, empty, torch.zeros((), device=x_BSD.device))
        return BackboneOutput(hidden_BSD, torch.stack(loads), torch.stack(balance_losses).sum())
