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
    moe_rows: Iterable[tuple[int, MoE]],
    load_LE: Tensor,
    config: BalanceConfig,
    accept: Tensor | None = None,
) -> None:
    """Apply one balancing move to every layer with experts.

    Call once per optimizer step, in the same branch as the optimizers, with the tokens per expert
    of the whole step: all microbatches, all processes that saw different tokens.

    Args:
        moe_rows: layers of this process with their row in ``load_LE``.
        load_LE: of all layers of the model.
        accept: boolean scalar; false leaves the biases as they are, as the step's parameters are.
    """
    if accept is not None and accept.is_cpu:
        if not accept:
            return
        accept = None
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
            _move(router.expert_bias, bias_E, accept)
            _move(router.bias_momentum, momentum_E, accept)
        elif config.rule == "sign":
            bias_E = sign_rule(router.expert_bias, load_E, step=config.step)
            _move(router.expert_bias, bias_E, accept)


def _move(state: Tensor, moved: Tensor, accept: Tensor | None) -> None:
    state.copy_(moved if accept is None else moved.where(accept, state))
