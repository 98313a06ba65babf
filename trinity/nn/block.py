"""One layer of the backbone: a mixer and a feed-forward, each between two norms."""

from __future__ import annotations

from torch import Tensor, nn

from trinity.core.config import ModelConfig
from trinity.nn.attention import GatedAttention, KeyValueCache
from trinity.nn.feedforward import SwiGLU
from trinity.nn.moe import MoE
from trinity.nn.norm import RMSNorm


class Block(nn.Module):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))) (report, eqs. 2-4 and 33)."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_pre_norm = RMSNorm(width, eps)
        self.mixer = GatedAttention(config, config.layer_types[layer_index])
        self.mixer_post_norm = RMSNorm(width, eps)
        self.ffn_pre_norm = RMSNorm(width, eps)
        self.ffn: SwiGLU | MoE = (
            SwiGLU(width, config.intermediate_size)
            if layer_index < config.num_dense_layers
            else MoE(config)
        )
        self.ffn_post_norm = RMSNorm(width, eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, S, D) -> (B, S, D) and, for a layer with experts, load_E and balance loss.

        The result is flat on purpose: reentrant recompute loses the gradient of anything nested.
        """
        mixed_BSD = self.mixer(self.mixer_pre_norm(x_BSD), rope, document_ids_BS, cache)
        x_BSD = x_BSD + self.mixer_post_norm(mixed_BSD)
        load_E = balance_loss = None
        if isinstance(self.ffn, MoE):
            out_BSD, load_E, balance_loss = self.ffn(self.ffn_pre_norm(x_BSD))
        else:
            out_BSD = self.ffn(self.ffn_pre_norm(x_BSD))
        return x_BSD + self.ffn_post_norm(out_BSD), load_E, balance_loss
