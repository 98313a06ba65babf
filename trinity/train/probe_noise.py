"""Whether experts specialise by noise level: pure functions of how often each was visited.

Loads are (L, U, E): visits to each of E experts in L layers, apart for U ranges of sigma. Visits of
many steps should be added up first, since the few images of one step have noise levels of their
own, and their tokens are much alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trinity.nn.balance import max_violation

MIN_SHARE = 0.01
"""A range with less of a layer's visits says little: few tokens cannot be spread evenly."""


def range_violation(load_LUE: Tensor, min_share: float = MIN_SHARE) -> Tensor:
    """MaxVio inside the range of sigma where it is largest, (L,).

    While an image is made, all its tokens are in one range at a time: what counts there is this,
    not the balance over all ranges. Ranges with less than ``min_share`` of a layer's visits are
    left out.
    """
    visits_LU = load_LUE.sum(-1)
    enough_LU = visits_LU >= min_share * visits_LU.sum(-1, keepdim=True)
    return max_violation(load_LUE).where(enough_LU & (visits_LU > 0), 0.0).amax(-1)


def range_information(load_LUE: Tensor) -> Tensor:
    """What a visit's range of sigma tells of its expert: their mutual information, nats, (L,).

    H(range) + H(expert) - H(range, expert). 0: every range visits the experts in the same
    proportions.
    """
    share_LUE = load_LUE / load_LUE.sum((-2, -1), keepdim=True).clamp(min=1.0)
    of_range, of_expert = _entropy(share_LUE.sum(-1)), _entropy(share_LUE.sum(-2))
    return (of_range + of_expert - _entropy(share_LUE.flatten(-2))).clamp(min=0.0)


def most_information(load_LUE: Tensor, num_experts_per_tok: int) -> Tensor:
    """The most that :func:`range_information` could be, nats, (L,).

    It is at most the entropy of the ranges. It is at most log(E / K) too: a token visits K
    different experts, so that even inside a range no expert has more than 1 / K of the visits.
    """
    share_LU = load_LUE.sum(-1) / load_LUE.sum((-2, -1)).clamp(min=1.0).unsqueeze(-1)
    of_choice = math.log(load_LUE.shape[-1] / num_experts_per_tok)
    return _entropy(share_LU).clamp(max=of_choice)


def _entropy(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(-1)
