"""One layer of the backbone: a mixer and a feed-forward, each between two norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trinity.core.model_config import PRESETS, BackboneConfig
from trinity.nn.attention import GatedAttention, KeyValueCache
from trinity.nn.feedforward import SwiGLU
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.mamba2 import Mamba2
from trinity.nn.modulation import Conditioning, Modulation, modulate
from trinity.nn.moe import MoE
from trinity.nn.norm import RMSNorm
from trinity.nn.scan_mixer import ScanCache

Mixer = GatedAttention | Mamba2 | LinearMixer
LayerCache = KeyValueCache | ScanCache
"""Attention's, or that of a linear-time layer."""


class Block(nn.Module):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))) (report, eqs. 2-4 and 33).

    Either half may be missing, as ``layer_types`` and ``ffn_types`` say. A block of a diffusion
    transformer shifts and scales what enters a half, and scales what leaves it, as noise level and
    condition demand; routers see what entered before that, and the noise level.
    """

    def __init__(self, config: BackboneConfig, layer_index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mixer = build_mixer(config, layer_index)
        if self.mixer is not None:
            self.mixer_pre_norm = RMSNorm(width, eps)
            self.mixer_post_norm = RMSNorm(width, eps)
        self.ffn = _build_feed_forward(config, layer_index)
        if self.ffn is not None:
            self.ffn_pre_norm = RMSNorm(width, eps)
            self.ffn_post_norm = RMSNorm(width, eps)
        self.adaln = Modulation(width) if config.is_image else None

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BS: Tensor | None = None,
        cache: LayerCache | None = None,
        conditioning: Conditioning | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, S, D) -> (B, S, D) and, for a layer with experts, load_E and balance loss.

        The result is flat on purpose: reentrant recompute loses the gradient of anything nested.
        """
        if conditioning is not None:
            return self._conditioned(x_BSD, rope, document_ids_BS, conditioning)
        if self.mixer is not None:
            mixed_BSD = self.mixer(self.mixer_pre_norm(x_BSD), rope, document_ids_BS, cache)
            x_BSD = x_BSD + self.mixer_post_norm(mixed_BSD)
        load_E = balance_loss = None
        if isinstance(self.ffn, MoE):
            out_BSD, load_E, balance_loss = self.ffn(self.ffn_pre_norm(x_BSD))
            x_BSD = x_BSD + self.ffn_post_norm(out_BSD)
        elif self.ffn is not None:
            x_BSD = x_BSD + self.ffn_post_norm(self.ffn(self.ffn_pre_norm(x_BSD)))
        return x_BSD, load_E, balance_loss

    def _conditioned(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BS: Tensor | None,
        conditioning: Conditioning,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, modulated; each row of ``load_E`` counts one range of sigma."""
        assert self.adaln is not None
        shift, scale, gate, *of_ffn = self.adaln(conditioning.modulation_BSMD)
        if self.mixer is not None:
            in_BSD = modulate(self.mixer_pre_norm(x_BSD), shift, scale)
            mixed_BSD = self.mixer(in_BSD, rope, document_ids_BS, sight=conditioning.sight)
            x_BSD = torch.addcmul(x_BSD, gate, self.mixer_post_norm(mixed_BSD)).to(x_BSD.dtype)
        if self.ffn is None:
            return x_BSD, None, None
        shift, scale, gate = of_ffn
        load_UE = balance_loss = None
        plain_BSD = self.ffn_pre_norm(x_BSD)
        in_BSD = modulate(plain_BSD, shift, scale)
        if isinstance(self.ffn, MoE):
            out_BSD, load_UE, balance_loss = self.ffn(
                in_BSD, plain_BSD, conditioning.time_BSD, conditioning.bucket_BS
            )
        else:
            out_BSD = self.ffn(in_BSD)
        x_BSD = torch.addcmul(x_BSD, gate, self.ffn_post_norm(out_BSD)).to(x_BSD.dtype)
        return x_BSD, load_UE, balance_loss


def build_mixer(config: BackboneConfig, layer_index: int) -> Mixer | None:
    """The token mixer of a layer; None for a layer without one."""
    layer_type = config.layer_types[layer_index]
    if layer_type == "none":
        return None
    if layer_type == "mamba2":
        return Mamba2(config)
    if layer_type in PRESETS:
        return LinearMixer(config, layer_type)
    return GatedAttention(config, layer_type)


def _build_feed_forward(config: BackboneConfig, layer_index: int) -> SwiGLU | MoE | None:
    kind = config.ffn_types[layer_index]
    if kind == "moe":
        return MoE(config)
    return SwiGLU(config.hidden_size, config.intermediate_size) if kind == "dense" else None
