"""The balancing state moves as the rules say, step after step."""

from __future__ import annotations

import pytest
import torch

from trinity.core.config import BalanceConfig, ModelConfig
from trinity.models.lm import LanguageModel
from trinity.nn.balance import sign_rule, smebu
from trinity.train.balancing import move_biases

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=8,
    moe_intermediate_size=8,
    num_hidden_layers=3,
    num_dense_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    route_scale=1.0,
    sliding_window=4,
)
LOADS = torch.tensor([[[4, 3, 1, 8], [0, 9, 9, 0]], [[4, 4, 3, 5], [5, 5, 5, 1]]])


@pytest.mark.parametrize("rule", ["smebu", "sign", "none"])
def test_two_moves_of_every_layer(rule: str) -> None:
    model = LanguageModel.initialized(CONFIG, seed=0)
    config = BalanceConfig.model_validate({"rule": rule, "step": 1e-2})
    bias_LE, momentum_LE = torch.zeros(2, 4), torch.zeros(2, 4)
    for load_LE in LOADS:
        move_biases(enumerate(model.moe_layers()), load_LE, config)
        if rule == "smebu":
            bias_LE, momentum_LE = smebu(
                bias_LE, momentum_LE, load_LE.float(), step=1e-2, decay=0.5, sharpness=2.0
            )
        elif rule == "sign":
            bias_LE = sign_rule(bias_LE, load_LE.float(), step=1e-2)
    for layer, moe in enumerate(model.moe_layers()):
        torch.testing.assert_close(moe.router.expert_bias, bias_LE[layer])
        torch.testing.assert_close(moe.router.bias_momentum, momentum_LE[layer])
    assert bool(bias_LE.any()) == (rule != "none")
