"""The one place where the experts' balancing bias moves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trinity.core.config import BalanceConfig
from trinity.nn.balance import sign_rule, smebu
from trinity.nn.moe import MoE


@torch.no_grad()
def move_biases(
    moe_rows: Iterable[tuple[int, MoE]], load_LE: Tensor, config: BalanceConfig
) -> None:
    """Apply one balancing move to every layer with experts.

    Call once per optimizer step, in the same branch as the optimizers, with the tokens per expert
    of the whole step: all microbatches, all processes that saw different tokens.

    Args:
        moe_rows: layers of this process with their row in ``load_LE``.
        load_LE: of all layers of the model.
    """
    for row, moe in moe_rows:
        router = moe.router
        load_E = load_LE[row].to(router.expert_bias.device).float()
        if config.rule == "smebu":
            bias_E, momentum_E = smebu(
                router.expert_bias,
                router.bias_momentum,
                load_E,
                step=config.step,
                decay=config.decay,
                sharpness=config.sharpness,
            )
            router.expert_bias.copy_(bias_E)
            router.bias_momentum.copy_(momentum_E)
        elif config.rule == "sign":
            router.expert_bias.copy_(sign_rule(router.expert_bias, load_E, step=config.step))
