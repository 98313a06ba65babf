"""The stack of blocks that the language model and the diffusion transformer share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import BackboneConfig
from trinity.models.first_block_cache import Reuse
from trinity.nn.block import Block, LayerCache
from trinity.nn.modulation import Conditioning
from trinity.nn.norm import RMSNorm
from trinity.nn.rope import rope_tables


class BackboneOutput(NamedTuple):
    """Hidden states and, for balancing, what the routers of all layers did."""

    hidden_BSD: Tensor
    load_LE: Tensor
    """Tokens per expert for each layer with experts that is here, int64; (0, E) without any. With a
    conditioning (L, buckets, E): those of each range of noise levels."""
    balance_loss: Tensor
    """Sequence-wise balance loss summed over rows and layers, fp32 scalar."""


class RowPart(NamedTuple):
    """Which part of each row the hidden states of this process are."""

    index: int = 0
    """This process holds the index-th of equal consecutive parts of the row (context parallel)."""
    stream_split: int = 1
    """Ways in which that part is split again between the matrices (sequence parallel)."""
    stream_index: int = 0
    """Which of these this process holds."""

    def own(self, x: Tensor, num_positions: int) -> Tensor:
        """What belongs to the ``num_positions`` of this process of something (B, S, ...) that
        covers the whole rows, or is one for all positions."""
        if x.shape[1] == 1:
            return x
        return x.narrow(
            1, (self.index * self.stream_split + self.stream_index) * num_positions, num_positions
        )


class Backbone(nn.Module):
    """Blocks by ``layer_types``, then the final norm.

    A pipeline stage keeps only its own blocks, under their numbers in the whole model, and the norm
    only if it is the last.
    """

    norm: RMSNorm | None

    def __init__(self, config: BackboneConfig) -> None:
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
        return self.run(x_BSD, rope, document_ids_BS, caches=caches)

    def run(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BS: Tensor | None,
        *,
        caches: Sequence[LayerCache] | None = None,
        conditioning: Conditioning | None = None,
    ) -> BackboneOutput:
        """Run all layers, with the tables of the positions given."""
        loads: list[Tensor] = []
        balance_losses: list[Tensor] = []
        for name, layer in self.layers.items():
            cache = None if caches is None else caches[int(name)]
            x_BSD, load_E, balance_loss = layer(x_BSD, rope, document_ids_BS, cache, conditioning)
            if load_E is not None:
                loads.append(load_E)
                balance_losses.append(balance_loss)
        if not loads:
            return self._without_load(x_BSD)
        hidden_BSD = x_BSD if self.norm is None else self.norm(x_BSD)
        return BackboneOutput(hidden_BSD, torch.stack(loads), torch.stack(balance_losses).sum())

    def run_reusing(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        conditioning: Conditioning,
        reuse: Reuse,
    ) -> BackboneOutput:
        """Run the first layer, and the others for the rows that ``reuse`` does not spare them; for
        sampling, with one image per row. The load of experts is not counted."""
        first, *others = self.layers.values()

        def run_others(x_NSD: Tensor, rows_N: Tensor) -> Tensor:
            own = conditioning.of_rows(rows_N)
            for layer in others:
                x_NSD = layer(x_NSD, rope, None, None, own)[0]
            return x_NSD

        after_first_BSD = first(x_BSD, rope, None, None, conditioning)[0]
        return self._without_load(reuse(x_BSD, after_first_BSD, run_others))

    def _without_load(self, x_BSD: Tensor) -> BackboneOutput:
        hidden_BSD = x_BSD if self.norm is None else self.norm(x_BSD)
        shape = (0, *load_shape(self.config))
        empty = torch.zeros(shape, dtype=torch.int64, device=x_BSD.device)
        return BackboneOutput(hidden_BSD, empty, torch.zeros((), device=x_BSD.device))


def load_shape(config: BackboneConfig) -> tuple[int, ...]:
    """Shape of one layer's load: (E,), or (buckets, E) where noise levels are told apart."""
    buckets = (config.load_buckets,) if isinstance(config, DiTConfig) else ()
    return (*buckets, config.num_experts)
