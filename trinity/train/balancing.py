"""The one place where the experts' balancing bias moves."""

from __future__ import annotations

import torch
from torch import Tensor

from trinity.core.config import BalanceConfig
from trinity.models.lm import LanguageModel
from trinity.nn.balance import sign_rule, smebu


@torch.no_grad()
def move_biases(model: LanguageModel, load_LE: Tensor, config: BalanceConfig) -> None:
    """Apply one balancing move to every layer with experts.

    Call once per optimizer step, in the same branch as the optimizers, with the tokens per expert
    of the whole step: all microbatches, all processes that saw different tokens.
    """
    for moe, load_E in zip(model.moe_layers(), load_LE, strict=True):
        router = moe.router
        if config.rule == "smebu":
            bias_E, momentum_E = smebu(
                router.expert_bias,
                router.bias_momentum,
                load_E.float(),
                step=config.step,
                decay=config.decay,
                sharpness=config.sharpness,
            )
            router.expert_bias.copy_(bias_E)
            router.bias_momentum.copy_(momentum_E)
        elif config.rule == "sign":
            router.expert_bias.copy_(
                sign_rule(router.expert_bias, load_E.float(), step=config.step)
            )
