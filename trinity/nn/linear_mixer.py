"""The simplified linear-time family: Mamba-2S, 2Mamba, 2Mamba-E, and everything between."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trinity.core.model_config import BackboneConfig, LinearOptions
from trinity.nn.conv import ShortConv
from trinity.nn.norm import GroupedRMSNorm, RMSNorm
from trinity.nn.rates import Rates, RateValues
from trinity.nn.scan_mixer import ReverseWay, ScanCache, ScanMixer, ScanWay
from trinity.ops.attention import forgetting_attention
from trinity.ops.image_attention import Sight


class ForgettingCache(ScanCache, Protocol):
    """Of a layer whose weights are exponentials, which has no state of fixed size."""

    def attend(
        self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, log_decay_BGS: Tensor
    ) -> Tensor:
        """Append the new tokens, attend from their queries, return (B, H, S, d)."""
        ...


class LinearMixer(ScanMixer):
    """o_proj of sums over past values, weighted by (q . k)^power and a decay (arXiv 2602.17363).

    q, k and v pass a short convolution each and are not activated; there are no positions but the
    decay. ``norm`` "rms" normalises the output over groups of channels, "sum" divides by the sum of
    the weights. The weights of power "exp" are exp(q . k / sqrt(d)): softmax attention that
    forgets, which keeps every token.
    """

    def __init__(self, config: BackboneConfig, layer_type: str) -> None:
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
        self.q_proj = nn.Linear(width, heads * dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, width, bias=False)
        self.take(_parts(config, options))
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if linear.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if linear.qk_norm else None
        self.out_norm = (
            GroupedRMSNorm(heads * dim, config.rms_norm_eps, linear.norm_groups)
            if options.norm == "rms"
            else None
        )
        if config.is_image:
            self.reverse = ReverseWay(heads, _parts(config, options))

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        document_ids_BS: Tensor | None = None,
        cache: ScanCache | None = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D). Nothing crosses a document's start, or its end.

        ``rope`` and ``sight`` are not used.
        """
        streams = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        out_BSD = self.scan_rows(x_BSD, streams, document_ids_BS, cache).flatten(2)
        return self.o_proj(out_BSD if self.out_norm is None else self.out_norm(out_BSD))

    def scan_way(
        self,
        way: ScanWay,
        streams: tuple[Tensor, Tensor, Tensor],
        rates: RateValues,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """One pass, (B, S, H, d)."""
        past = (document_ids_BS, cache)
        q_BSHd, k_BSGd, v_BSGd = (
            self._heads(way.convolve(name, stream_BSC, *past))
            for name, stream_BSC in zip(("q_conv", "k_conv", "v_conv"), streams, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        log_decay_BSG, dt_BSG = rates
        if dt_BSG is not None:
            v_BSGd = (v_BSGd * dt_BSG.unsqueeze(-1)).to(v_BSGd.dtype)
        mix = self._attend if self.is_attention else self.mix
        return mix(way, q_BSHd, k_BSGd, v_BSGd, log_decay_BSG, *past)

    def _attend(
        self,
        way: ScanWay,
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
        if way.attention_context is not None:
            k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS = way.attention_context(
                k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS
            )
        return forgetting_attention(
            q_BHSd, k_BGSd, v_BGSd, log_decay_BGS, document_ids_BS=document_ids_BS
        ).transpose(1, 2)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return torch.unflatten(x_BSD, -1, (-1, self.head_dim))


def _parts(config: BackboneConfig, options: LinearOptions) -> dict[str, nn.Module | None]:
    """What each way of a layer has for itself."""
    linear, (heads, kv_heads) = config.linear, config.linear_heads

    def conv(num_heads: int, *, bias: bool = linear.conv_bias) -> ShortConv | None:
        if linear.conv_width == 1:
            return None
        return ShortConv(num_heads * linear.head_dim, linear.conv_width, bias=bias)

    rates = Rates(
        config.hidden_size,
        kv_heads,
        decay=options.decay,
        value_dt=options.value_dt,
        decay_bias=linear.decay_bias == "log_spaced",
    )
    # What is added to every key changes no softmax: such a bias would drift with the noise.
    k_conv = conv(kv_heads, bias=linear.conv_bias and options.power != "exp")
    return {"rates": rates, "q_conv": conv(heads), "v_conv": conv(kv_heads), "k_conv": k_conv}
