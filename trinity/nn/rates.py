"""Per head and token: how fast a linear-time mixer forgets, and how much it takes in.

All in fp32 whatever the precision of the model: decays are multiplied over thousands of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.model_config import Decay
from trinity.core.runtime import autocast_disabled


class RateValues(NamedTuple):
    """What :class:`Rates` returns."""

    log_decay_BSU: Tensor
    dt_BSU: Tensor | None
    """Factor on the values."""


class Rates(nn.Module):
    """Decays and steps of ``num_heads`` heads from the input of the mixer.

    ``softplus``: log decay = -softplus(x W_A + b), its own projection (arXiv 2602.17363, section
    3.1); b only if ``decay_bias``. ``mamba2``: log decay = -exp(A_log) dt with dt = softplus(x W_dt
    + dt_bias) (arXiv 2405.21060). ``none``: nothing is forgotten.

    Steps alone (``value_dt`` without a decay of kind mamba2) are softplus(x W_dt), without a bias.
    """

    def __init__(
        self, width: int, num_heads: int, *, decay: Decay, value_dt: bool, decay_bias: bool = False
    ) -> None:
        super().__init__()
        self.value_dt = value_dt
        is_mamba2 = decay == "mamba2"

        def parameter(*shape: int, wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if wanted else None

        self.decay_weight = parameter(num_heads, width, wanted=decay == "softplus")
        self.decay_bias = parameter(num_heads, wanted=decay == "softplus" and decay_bias)
        self.dt_weight = parameter(num_heads, width, wanted=is_mamba2 or value_dt)
        self.dt_bias = parameter(num_heads, wanted=is_mamba2)
        self.A_log = parameter(num_heads, wanted=is_mamba2)

    def forward(self, x_BSD: Tensor, num_heads: int) -> RateValues:
        """(B, S, D) -> (B, S, U) each; ``num_heads`` is U, the number of heads that are here."""
        with autocast_disabled(x_BSD.device):
            dt_BSU = None
            if self.dt_weight is not None:
                dt_BSU = F.softplus(_project(x_BSD, self.dt_weight, self.dt_bias))
            if self.A_log is not None:
                assert dt_BSU is not None
                log_decay_BSU = -self.A_log.to(dt_BSU.dtype).exp() * dt_BSU
            elif self.decay_weight is not None:
                log_decay_BSU = -F.softplus(_project(x_BSD, self.decay_weight, self.decay_bias))
            else:
                wide = torch.promote_types(x_BSD.dtype, torch.float32)
                log_decay_BSU = x_BSD.new_zeros(*x_BSD.shape[:2], num_heads, dtype=wide)
            return RateValues(log_decay_BSU, dt_BSU if self.value_dt else None)


def _project(x_BSD: Tensor, weight_UD: Tensor, bias_U: Tensor | None) -> Tensor:
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    return F.linear(x_BSD.to(wide), weight_UD.to(wide), None if bias_U is None else bias_U.to(wide))
