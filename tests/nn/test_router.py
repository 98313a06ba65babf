"""The router: bias in the choice only, weights normalised and scaled."""

from __future__ import annotations

import pytest
import torch

from trinity.nn.router import SigmoidRouter


def _router(weights: list[list[float]], bias: list[float]) -> SigmoidRouter:
    router = SigmoidRouter(1, 4, 2, 2.826)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weights))
        router.expert_bias.copy_(torch.tensor(bias))
    return router


def test_weights_follow_the_worked_example() -> None:
    scores = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.8, 0.5, 0.4, 0.1], [0.7, 0.2, 0.6, 0.5]])
    expected = [
        {0: 1.6956, 1: 1.1304},
        {0: 1.739077, 1: 1.086923},
        {3: 1.284545, 2: 1.541455},
    ]
    for row, wanted in zip(scores, expected, strict=True):
        router = _router(torch.logit(row)[:, None].tolist(), [-0.2, 0.0, 0.09, 0.3])
        routing = router(torch.ones(1, 1))
        torch.testing.assert_close(routing.scores_TE[0], row)
        chosen = dict(zip(routing.index_TK[0].tolist(), routing.weight_TK[0].tolist(), strict=True))
        assert chosen == pytest.approx(wanted, abs=1e-5)


def test_scores_are_fp32_and_the_bias_gets_no_gradient_even_under_autocast() -> None:
    router = SigmoidRouter(16, 8, 2, 1.0)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(5, 16, requires_grad=True)
    exact = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.scores_TE.dtype == torch.float32
    assert torch.equal(routing.scores_TE, exact.scores_TE)
    routing.weight_TK.sum().backward()
    assert not router.expert_bias.requires_grad
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    assert {name for name, _ in router.named_buffers()} == {"expert_bias", "bias_momentum"}
