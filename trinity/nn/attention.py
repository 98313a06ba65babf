"""Gated grouped-query attention with QK-norm, over the past of a text or over whole images."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import BackboneConfig, LayerType
from trinity.nn.norm import RMSNorm
from trinity.ops.attention import causal_attention
from trinity.ops.elementwise import rotary, sigmoid_gate
from trinity.ops.image_attention import Sight, image_attention


class KeyValueCache(Protocol):
    """Where a layer keeps the keys and values of tokens it has already seen."""

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        """Append the new keys and values, attend from the new queries, return (B, H, S, d)."""
        ...


class ContextExchange(Protocol):
    """Brings the keys and values that other parts of the rows hold on other processes."""

    def __call__(
        self, k_BGSd: Tensor, v_BGSd: Tensor, document_ids_BS: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Own keys and values with what the own queries may see of others', by position.

        ``document_ids_BS`` covers the whole rows; the result covers the returned keys. Of texts
        that is what precedes the own, of images everything.
        """
        ...


class GatedAttention(nn.Module):
    """o_proj(attention(q, k, v) * sigmoid(gate(x))) (report, eqs. 1-14).

    q and k are RMS-normalised per head with one gain vector each. Layers of type
    ``sliding_attention`` apply rotary positions and see ``sliding_window`` keys, the token itself
    included; layers of type ``full_attention`` see everything before and use no positions.

    In a model of images both see what comes after as well, ``sliding_window`` is the side of a
    square of base tokens, and global layers rotate too if ``rotate_global``.
    """

    def __init__(self, config: BackboneConfig, layer_type: LayerType) -> None:
        super().__init__()
        width, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim = config.head_dim
        self.window = config.sliding_window if layer_type == "sliding_attention" else None
        self.is_image = config.is_image
        self.rotates = self.window is not None
        if isinstance(config, DiTConfig):
            self.rotates |= config.rotate_global
        self.backend = "auto"
        self.context: ContextExchange | None = None
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.gate_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        ``rope`` holds the cosines and sines of the tokens' positions, (S, head_dim), or with a
        ``sight`` (B or 1, S, head_dim). Attention never crosses a boundary of ``document_ids_BS``;
        with a ``cache`` there are no documents. Images need a ``sight`` of the whole rows, which
        knows their documents itself.
        """
        q_BHSd = self.q_norm(self._heads(self.q_proj(x_BSD))).transpose(1, 2)
        k_BGSd = self.k_norm(self._heads(self.k_proj(x_BSD))).transpose(1, 2)
        v_BGSd = self._heads(self.v_proj(x_BSD)).transpose(1, 2)
        if self.rotates:
            q_BHSd, k_BGSd = rotary(q_BHSd, *rope), rotary(k_BGSd, *rope)
        if cache is not None:
            out_BHSd = cache.attend(q_BHSd, k_BGSd, v_BGSd)
        else:
            out_BHSd = self._attend(q_BHSd, k_BGSd, v_BGSd, document_ids_BS, sight)
        out_BSD = out_BHSd.transpose(1, 2).flatten(2)
        return self.o_proj(sigmoid_gate(out_BSD, self.gate_proj(x_BSD)))

    def _attend(
        self,
        q_BHSd: Tensor,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        document_ids_BS: Tensor | None,
        sight: Sight | None,
    ) -> Tensor:
        if self.context is not None:
            k_BGSd, v_BGSd, document_ids_BS = self.context(
                k_BGSd, v_BGSd, document_ids_BS, self.window
            )
        options = {"window": self.window, "backend": self.backend}
        if self.is_image:
            assert sight is not None, "attention over images needs to know who sees whom"
            return image_attention(q_BHSd, k_BGSd, v_BGSd, sight, **options)
        return causal_attention(q_BHSd, k_BGSd, v_BGSd, document_ids_BS=document_ids_BS, **options)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return torch.unflatten(x_BSD, -1, (-1, self.head_dim))
