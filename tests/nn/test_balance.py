"""Balancing rules against hand-computed tables and their invariants."""

from __future__ import annotations

import math

import pytest
import torch

from trinity.nn.balance import (
    load_entropy,
    max_violation,
    sequence_balance_loss,
    sign_rule,
    smebu,
)

LOADS = [[4.0, 3, 1, 8], [4, 4, 3, 5], [4, 4, 4, 4]]
# The released constants: lambda 5e-4, beta 0.5, kappa 2, from zero, in fp64.
SMEBU_BIASES = [
    [-2.520236e-05, 9.032692e-05, 2.010847e-04, -2.662093e-04],
    [-3.780355e-05, 1.354904e-04, 4.171563e-04, -5.148432e-04],
    [-4.410414e-05, 1.580721e-04, 5.251922e-04, -6.391601e-04],
]
SIGN_BIASES = [
    [-2.5e-4, 7.5e-4, 7.5e-4, -1.25e-3],
    [-2.5e-4, 7.5e-4, 1.75e-3, -2.25e-3],
    [-2.5e-4, 7.5e-4, 1.75e-3, -2.25e-3],
]
TRINITY = {"step": 5e-4, "decay": 0.5, "sharpness": 2.0}


def _zeros(size: int = 4) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64)


def test_smebu_follows_the_table() -> None:
    bias_E, momentum_E = _zeros(), _zeros()
    for loads, expected in zip(LOADS, SMEBU_BIASES, strict=True):
        load_E = torch.tensor(loads, dtype=torch.float64)
        bias_E, momentum_E = smebu(bias_E, momentum_E, load_E, **TRINITY)
        torch.testing.assert_close(
            bias_E, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-11
        )


def test_sign_rule_follows_the_table() -> None:
    bias_E = _zeros()
    for loads, expected in zip(LOADS, SIGN_BIASES, strict=True):
        bias_E = sign_rule(bias_E, torch.tensor(loads, dtype=torch.float64), step=1e-3)
        torch.testing.assert_close(bias_E, torch.tensor(expected, dtype=torch.float64))


def test_smebu_sums_stay_zero_and_momentum_stays_bounded() -> None:
    bias_E, momentum_E = torch.zeros(256), torch.zeros(256)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        load_E = torch.rand(256, generator=generator).pow(8) * 1e6
        bias_E, momentum_E = smebu(bias_E, momentum_E, load_E, **TRINITY)
        assert abs(float(momentum_E.sum())) < 1e-6
        assert abs(float(bias_E.sum())) < 1e-4
        assert float(momentum_E.abs().max()) < 2 * TRINITY["step"]
    assert bias_E.dtype == torch.float32


@pytest.mark.parametrize("factor", [2.0, 0.25, 1e6])
def test_scaling_all_loads_changes_nothing(factor: float) -> None:
    load_E = torch.rand(16, dtype=torch.float64)
    state = (torch.rand(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64))
    one, other = (smebu(*state, load_E * f, **TRINITY) for f in (1.0, factor))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        sign_rule(state[0], load_E, step=1e-3), sign_rule(state[0], load_E * factor, step=1e-3)
    )


def test_perfect_balance_halves_the_momentum() -> None:
    momentum_E = torch.tensor([3e-4, -1e-4, -2e-4, 0.0], dtype=torch.float64)
    bias_E, moved_E = smebu(_zeros(), momentum_E, torch.full_like(momentum_E, 7), **TRINITY)
    torch.testing.assert_close(moved_E, momentum_E / 2)
    torch.testing.assert_close(bias_E, momentum_E / 2)


def test_infinite_sharpness_is_the_centred_sign_rule() -> None:
    load_E = torch.tensor([4.0, 3, 1, 8], dtype=torch.float64)
    sharp, _ = smebu(_zeros(), _zeros(), load_E, step=1e-3, decay=0.0, sharpness=1e9)
    torch.testing.assert_close(sharp, sign_rule(_zeros(), load_E, step=1e-3))


def test_a_layer_without_load_is_left_alone_and_layers_are_independent() -> None:
    load_LE = torch.tensor([[4.0, 3, 1, 8], [0, 0, 0, 0]], dtype=torch.float64)
    bias_LE = torch.rand(2, 4, dtype=torch.float64)
    momentum_LE = torch.rand(2, 4, dtype=torch.float64)
    bias, momentum = smebu(bias_LE, momentum_LE, load_LE, **TRINITY)
    assert torch.equal(bias[1], bias_LE[1])
    assert torch.equal(momentum[1], momentum_LE[1])
    alone = smebu(bias_LE[0], momentum_LE[0], load_LE[0], **TRINITY)
    torch.testing.assert_close((bias[0], momentum[0]), alone)


def test_balance_loss_follows_the_worked_example() -> None:
    scores_BSE = torch.tensor(
        [[[0.9, 0.6, 0.3, 0.2], [0.8, 0.5, 0.4, 0.1], [0.7, 0.2, 0.6, 0.5]]],
        dtype=torch.float64,
        requires_grad=True,
    )
    # 0.09 instead of the example's 0.1, which ties two experts of the second token.
    bias_E = torch.tensor([-0.2, 0.0, 0.09, 0.3])
    index_BSK = torch.topk(scores_BSE.detach() + bias_E, 2).indices
    assert [set(row) for row in index_BSK[0].tolist()] == [{0, 1}, {0, 1}, {2, 3}]
    loss = sequence_balance_loss(scores_BSE, index_BSK, 4)
    assert float(loss) == pytest.approx(1.093827, abs=1e-6)
    loss.backward()
    # Through P only: d/ds_tj of sum_i f_i s_ti / sum_k s_tk, with f constant, over T tokens.
    f_E = torch.tensor([4 / 3, 4 / 3, 2 / 3, 2 / 3], dtype=torch.float64)
    s_SE = scores_BSE.detach()[0]
    total_S1 = s_SE.sum(-1, keepdim=True)
    expected = (f_E - (f_E * s_SE).sum(-1, keepdim=True) / total_S1) / total_S1 / 3
    assert scores_BSE.grad is not None
    torch.testing.assert_close(scores_BSE.grad[0], expected)


def test_balance_loss_is_one_per_row_at_perfect_balance_and_adds_rows() -> None:
    scores_BSE = torch.full((3, 8, 4), 0.5, dtype=torch.float64)
    index_BSK = torch.arange(16).reshape(8, 2).remainder(4).expand(3, 8, 2)
    assert float(sequence_balance_loss(scores_BSE, index_BSK, 4)) == pytest.approx(3.0)


def test_measures_of_imbalance() -> None:
    assert max_violation(torch.tensor([4.0, 4, 4, 4])) == 0
    assert max_violation(torch.tensor([4.0, 3, 1, 8])) == 1
    # Total collapse on K of E experts is E / K - 1.
    collapsed = torch.zeros(256)
    collapsed[:4] = 100
    assert max_violation(collapsed) == 63
    assert float(load_entropy(torch.full((8,), 3.0))) == pytest.approx(1.0)
    assert float(load_entropy(torch.tensor([9.0, 0, 0, 0]))) == 0
    half = load_entropy(torch.tensor([1.0, 1, 0, 0]))
    assert float(half) == pytest.approx(math.log(2) / math.log(4))
