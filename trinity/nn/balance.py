"""Balancing of experts: bias rules, the sequence-wise loss, and the measures of imbalance.

Pure functions over tensors whose last dim is experts; a leading layer dim is allowed everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smebu(
    bias_E: Tensor,
    momentum_E: Tensor,
    load_E: Tensor,
    *,
    step: float,
    decay: float,
    sharpness: float,
) -> tuple[Tensor, Tensor]:
    """One balancing move per optimizer step (Trinity report, eqs. 23-28).

    Args:
        bias_E, momentum_E: state, both zero at the start.
        load_E: tokens per expert over the whole global batch. Scaling all loads changes nothing;
            a layer without any load keeps bias and momentum.
        step: lambda, the largest move of one expert before centring.
        decay: beta of the momentum.
        sharpness: kappa; towards infinity the rule becomes the centred sign rule.

    Returns new (bias_E, momentum_E); both sum to zero.
    """
    mean_1 = load_E.mean(-1, keepdim=True)
    violation_E = (mean_1 - load_E) / mean_1.clamp(min=torch.finfo(load_E.dtype).tiny)
    move_E = step * torch.tanh(sharpness * violation_E)
    move_E = (move_E - move_E.mean(-1, keepdim=True)).to(bias_E.dtype)
    moved_E = decay * momentum_E + (1 - decay) * move_E
    has_load_1 = mean_1 > 0
    momentum_E = torch.where(has_load_1, moved_E, momentum_E)
    return torch.where(has_load_1, bias_E + momentum_E, bias_E), momentum_E


def sign_rule(bias_E: Tensor, load_E: Tensor, *, step: float) -> Tensor:
    """b + step * sign(mean load - load), re-centred (Trinity report, eqs. 19-22)."""
    violation_E = load_E.mean(-1, keepdim=True) - load_E
    moved_E = bias_E + step * torch.sign(violation_E).to(bias_E.dtype)
    return moved_E - moved_E.mean(-1, keepdim=True)


def sequence_balance_loss(
    scores_BSE: Tensor,
    index_BSK: Tensor,
    num_experts: int,
    *,
    num_parts: int = 1,
    sum_over_parts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum over rows of sum_i f_i P_i (Trinity report, eqs. 29-32), an fp32 scalar.

    f_i = E / (K S) * number of the row's tokens that chose expert i; P_i is the row's mean of the
    scores normalised over all experts. Gradient flows through P only. Perfect balance gives 1 per
    row.

    Where ``num_parts`` processes hold equal parts of the same rows, ``sum_over_parts`` adds up a
    tensor over them (counts: no gradient); the results of all parts then sum to the loss.
    """
    num_tokens, num_chosen = index_BSK.shape[1] * num_parts, index_BSK.shape[2]
    count_BE = torch.zeros(
        index_BSK.shape[0], num_experts, dtype=scores_BSE.dtype, device=scores_BSE.device
    )
    ones = torch.ones((), dtype=scores_BSE.dtype, device=scores_BSE.device)
    flat_BR = index_BSK.flatten(1)
    count_BE.scatter_add_(1, flat_BR, ones.expand_as(flat_BR))
    if sum_over_parts is not None:
        count_BE = sum_over_parts(count_BE)
    fraction_BE = count_BE * (num_experts / (num_chosen * num_tokens))
    share_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).sum(1) / num_tokens
    return (fraction_BE * share_BE).sum()


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load (report, eq. 42); 0 is perfect balance."""
    mean = load_E.mean(-1)
    return (load_E.amax(-1) - mean) / mean.clamp(min=torch.finfo(load_E.dtype).tiny)


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load divided by its maximum log E; 1 is perfect balance, 0 one expert."""
    share_E = load_E / load_E.sum(-1, keepdim=True).clamp(min=torch.finfo(load_E.dtype).tiny)
    return torch.special.entr(share_E).sum(-1) / torch.log(torch.tensor(float(load_E.shape[-1])))
