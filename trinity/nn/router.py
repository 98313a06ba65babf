"""Sigmoid router whose balancing bias takes part in the choice of experts only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.runtime import autocast_disabled


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    index_TK: Tensor
    """Chosen experts, int64."""
    weight_TK: Tensor
    """Weights of the experts' outputs, fp32, summing to the route scale."""
    scores_TE: Tensor
    """Unbiased sigmoid scores of all experts, fp32."""


class SigmoidRouter(nn.Module):
    """Scores, biased selection and normalised weights (report, eqs. 15-18).

    ``expert_bias`` and ``bias_momentum`` are fp32 buffers that no gradient and no forward pass
    touches; :mod:`trinity.train.balancing` moves them once per optimizer step.

    With ``sees_time`` a second matrix, zero at first, adds what the noise level has to say.
    """

    expert_bias: Tensor
    bias_momentum: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        route_scale: float,
        *,
        sees_time: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.route_scale = route_scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.time_weight = (
            nn.Parameter(torch.empty(num_experts, hidden_size)) if sees_time else None
        )
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("bias_momentum", torch.zeros(num_experts, dtype=torch.float32))

    def float_state(self) -> None:
        """Bring the balancing state back to fp32 after the module was cast."""
        self.expert_bias = self.expert_bias.float()
        self.bias_momentum = self.bias_momentum.float()

    def forward(self, x_TD: Tensor, time_BSD: Tensor | None = None) -> Routing:
        """Route T tokens, given embeddings of their noise levels where the router sees these.

        ``time_BSD`` is (B, S, D), or (B, 1, D) for rows that have one level each.

        The product runs in at least fp32: bf16 logits change the chosen set for several percent
        of the tokens, and the matrix is too small for the cost to matter.
        """
        with autocast_disabled(x_TD.device):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
            if self.time_weight is not None:
                assert time_BSD is not None
                added_BSE = F.linear(time_BSD.to(wide), self.time_weight.to(wide))
                logits_BSE = logits_TE.unflatten(0, (len(added_BSE), -1)) + added_BSE
                logits_TE = logits_BSE.flatten(0, 1)
            scores_TE = torch.sigmoid(logits_TE)
            biased_TE = scores_TE.detach() + self.expert_bias
            index_TK = torch.topk(biased_TE, self.num_experts_per_tok, dim=-1, sorted=False)[1]
            chosen_TK = scores_TE.gather(-1, index_TK)
            weight_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * self.route_scale
        return Routing(index_TK, weight_TK, scores_TE)
