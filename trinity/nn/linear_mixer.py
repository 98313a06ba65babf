"""The simplified linear-time family: Mamba-2S, 2Mamba, 2Mamba-E, and everything between."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trinity.core.model_config import ModelConfig
from trinity.nn.conv import ShortConv
from trinity.nn.norm import GroupedRMSNorm, RMSNorm
from trinity.nn.rates import Rates
from trinity.nn.scan_mixer import ScanCache, ScanMixer
from trinity.ops.attention import forgetting_attention


class ForgettingCache(ScanCache, Protocol):
    """Of a layer whose weights are exponentials, which has no state of fixed size."""

    def attend(
        self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, log_decay_BGS: Tensor
    ) -> Tensor:
        """Append the new tokens, attend from their queries, return (B, H, S, d)."""
        ...


class DecayingContext(Protocol):
    """Brings the tokens that earlier parts of the rows hold on other processes."""

    def __call__(
        self,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        log_decay_BGS: Tensor,
        document_ids_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All keys, values, log decays and ids up to the end of this part."""
        ...


class LinearMixer(ScanMixer):
    """o_proj of sums over past values, weighted by (q . k)^power and a decay (arXiv 2602.17363).

    q, k and v pass a short convolution each and are not activated; there are no positions but the
    decay. ``norm`` "rms" normalises the output over groups of channels, "sum" divides by the sum of
    the weights. The weights of power "exp" are exp(q . k / sqrt(d)): softmax attention that
    forgets, which keeps every token.
    """

    def __init__(self, config: ModelConfig, layer_type: str) -> None:
        linear, options = config.linear, config.linear.options(layer_type)
        is_attention = options.power == "exp"
        super().__init__(
            power=1 if options.power == "exp" else options.power,
            normalize=options.norm == "sum" and not is_attention,
            scale=None,
        )
        width, dim = config.hidden_size, linear.head_dim
        heads, kv_heads = config.linear_heads
        self.head_dim, self.is_attention = dim, is_attention
        self.attention_context: DecayingContext | None = None
        self.q_proj = nn.Linear(width, heads * dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, width, bias=False)
        self.rates = Rates(
            width,
            kv_heads,
            decay=options.decay,
            value_dt=options.value_dt,
            decay_bias=linear.decay_bias == "log_spaced",
        )

        def conv(num_heads: int, *, bias: bool = linear.conv_bias) -> ShortConv | None:
            if linear.conv_width == 1:
                return None
            return ShortConv(num_heads * dim, linear.conv_width, bias=bias)

        self.q_conv, self.v_conv = conv(heads), conv(kv_heads)
        # What is added to every key changes no softmax: such a bias would drift with the noise.
        self.k_conv = conv(kv_heads, bias=linear.conv_bias and not is_attention)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if linear.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if linear.qk_norm else None
        self.out_norm = (
            GroupedRMSNorm(heads * dim, config.rms_norm_eps, linear.norm_groups)
            if options.norm == "rms"
            else None
        )

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        document_ids_BS: Tensor | None = None,
        cache: ScanCache | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D). ``rope`` is not used. Nothing crosses a document's start."""
        past = (document_ids_BS, cache)
        q_BSHd = self._heads(self.convolve("q_conv", self.q_proj(x_BSD), *past))
        k_BSGd = self._heads(self.convolve("k_conv", self.k_proj(x_BSD), *past))
        v_BSGd = self._heads(self.convolve("v_conv", self.v_proj(x_BSD), *past))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        log_decay_BSG, dt_BSG = self.rates(x_BSD, k_BSGd.shape[2])
        if dt_BSG is not None:
            v_BSGd = (v_BSGd * dt_BSG.unsqueeze(-1)).to(v_BSGd.dtype)
        if self.is_attention:
            out_BSHd = self._attend(q_BSHd, k_BSGd, v_BSGd, log_decay_BSG, *past)
        else:
            out_BSHd = self.mix(q_BSHd, k_BSGd, v_BSGd, log_decay_BSG, *past)
        out_BSD = out_BSHd.flatten(2)
        return self.o_proj(out_BSD if self.out_norm is None else self.out_norm(out_BSD))

    def _attend(
        self,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSGd: Tensor,
        log_decay_BSG: Tensor,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        q_BHSd, k_BGSd, v_BGSd = (x.transpose(1, 2) for x in (q_BSHd, k_BSGd, v_BSGd))
        log_decay_BGS = log_decay_BSG.transpose(1, 2)
        if cache is not None:
            return cache.attend(q_BHSd, k_BGSd, v_BGSd, log_decay_BGS).transpose(1, 2)  # type: ignore[attr-defined]
        if self.attention_context is not None:
            k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS = self.attention_context(
                k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS
            )
        return forgetting_attention(
            q_BHSd, k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS=document_ids_BS
        ).transpose(1, 2)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return torch.unflatten(x_BSD, -1, (-1, self.head_dim))
