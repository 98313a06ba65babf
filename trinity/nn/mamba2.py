"""Mamba-2, complete: grouped B and C, convolution, step bias, gate, skip, grouped norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.model_config import BackboneConfig
from trinity.nn.conv import ShortConv
from trinity.nn.norm import GroupedRMSNorm
from trinity.nn.rates import Rates, RateValues
from trinity.nn.scan_mixer import ReverseWay, ScanCache, ScanMixer, ScanWay
from trinity.ops.image_attention import Sight


class Skip(nn.Module):
    """y + D x with one D per head, kept in fp32."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self, y_BSUe: Tensor, x_BSUe: Tensor) -> Tensor:
        """(B, S, U, e) each."""
        return y_BSUe + (x_BSUe * self.weight.unsqueeze(-1)).to(y_BSUe.dtype)


class Mamba2(ScanMixer):
    """o_proj(norm((scan(C, B, dt x) + D x) * silu(z))) (arXiv 2405.21060, section 7).

    What that paper calls C, B and x is q, k and v here: ``num_groups`` heads of q and k, each
    shared by several heads of v. All three pass a convolution and SiLU. The norm sees each group of
    channels apart, after the gate.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(power=1, normalize=False, scale=1.0)
        mamba2, width, heads = config.mamba2, config.hidden_size, config.mamba2_heads
        self.head_dim, self.state_dim = mamba2.head_dim, mamba2.state_dim
        inner, shared = heads * mamba2.head_dim, mamba2.num_groups * mamba2.state_dim
        self.q_proj = nn.Linear(width, shared, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.take(_parts(config))
        self.out_norm = GroupedRMSNorm(inner, config.rms_norm_eps, mamba2.num_groups)
        if config.is_image:
            self.reverse = ReverseWay(heads, _parts(config))

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
        y_BSD = self.scan_rows(x_BSD, streams, document_ids_BS, cache).flatten(2)
        return self.o_proj(self.out_norm(y_BSD * F.silu(self.gate_proj(x_BSD))))

    def scan_way(
        self,
        way: ScanWay,
        streams: tuple[Tensor, Tensor, Tensor],
        rates: RateValues,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """One pass with its skip, (B, S, U, e)."""
        past = (document_ids_BS, cache)
        q_BSD, k_BSD, v_BSD = (
            F.silu(way.convolve(name, stream_BSC, *past))
            for name, stream_BSC in zip(("q_conv", "k_conv", "v_conv"), streams, strict=True)
        )
        q_BSGd, k_BSGd = (torch.unflatten(x, -1, (-1, self.state_dim)) for x in (q_BSD, k_BSD))
        v_BSUe = torch.unflatten(v_BSD, -1, (-1, self.head_dim))
        log_decay_BSU, dt_BSU = rates
        assert dt_BSU is not None
        taken_BSUe = (v_BSUe * dt_BSU.unsqueeze(-1)).to(v_BSUe.dtype)
        y_BSUe = self.mix(way, q_BSGd, k_BSGd, taken_BSUe, log_decay_BSU, *past)
        assert isinstance(way.skip, Skip)
        return way.skip(y_BSUe, v_BSUe)


def _parts(config: BackboneConfig) -> dict[str, nn.Module | None]:
    """What each way of a layer has for itself."""
    mamba2, heads = config.mamba2, config.mamba2_heads
    inner, shared = heads * mamba2.head_dim, mamba2.num_groups * mamba2.state_dim

    def conv(num_channels: int) -> ShortConv | None:
        if mamba2.conv_width == 1:
            return None
        return ShortConv(num_channels, mamba2.conv_width, bias=mamba2.conv_bias)

    return {
        "q_conv": conv(shared),
        "k_conv": conv(shared),
        "v_conv": conv(inner),
        "rates": Rates(config.hidden_size, heads, decay="mamba2", value_dt=True),
        "skip": Skip(heads),
    }
