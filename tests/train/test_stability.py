"""What is judged a spike, what is clipped, and that a refused step leaves no trace."""

from __future__ import annotations

import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trinity.core.config import BalanceConfig, OptimConfig, StabilityConfig
from trinity.nn.balance import smebu
from trinity.nn.router import SigmoidRouter
from trinity.optim.groups import step_adamw
from trinity.optim.muon import Muon
from trinity.train.balancing import move_biases
from trinity.train.stability import (
    ZCLIP_WARMUP,
    Judge,
    Verdict,
    robust_score,
    zclip_limit,
)

SKIPPING = StabilityConfig(skip_spikes=True)


def _verdicts(losses: list[float], norms: list[float], config: StabilityConfig) -> list[Verdict]:
    judge = Judge(config, OptimConfig())
    return [
        judge.verdict(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
        for loss, norm in zip(losses, norms, strict=True)
    ]


def _refused(losses: list[float], norms: list[float] | None = None) -> list[int]:
    norms = norms or [1.0] * len(losses)
    verdicts = _verdicts(losses, norms, SKIPPING)
    return [step for step, verdict in enumerate(verdicts) if not verdict.accept]


def _descent(num_steps: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [2.0 + 9.0 * math.exp(-s / 60) + draw.gauss(0, noise) for s in range(num_steps)]


def test_robust_score_by_hand() -> None:
    history = [float("nan"), 3.0, 1.0, 2.0, 5.0, 3.0]
    moves = [-2.0, 1.0, 3.0, -2.0]
    middle = sorted(moves)[1]  # torch takes the lower of two middle ones
    spread = 1.4826 * sorted(abs(m - middle) for m in moves)[1] / 2**0.5 + 3e-3
    score = robust_score(torch.tensor(9.0), torch.tensor(history), 5)
    assert float(score) == pytest.approx((9.0 - 3.0) / spread, rel=1e-6)
    assert float(robust_score(torch.tensor(9.0), torch.tensor(history), 6)) == 0.0
    assert math.isnan(robust_score(torch.tensor(float("inf")), torch.tensor(history), 6))


def test_a_spike_in_a_steep_descent_is_seen_and_nothing_else() -> None:
    losses = _descent(400)
    losses[120] += 1.0
    losses[300] += 0.5
    assert _refused(losses) == [120, 300]


def test_a_not_finite_step_does_not_poison_the_yardstick() -> None:
    losses = _descent(300)
    losses[150] = float("nan")
    losses[170] = float("inf")
    norms = [1.0] * 300
    norms[190] = float("inf")
    losses[250] += 2.0
    assert _refused(losses, norms) == [150, 170, 190, 250]


def test_quiet_steps_are_never_refused() -> None:
    """Heavy tails at that: a batch in fifty scatters nearly twice as much as the others."""
    draw = random.Random(1)
    losses = _descent(20_000)
    for step in range(0, 20_000, 50):
        losses[step] += draw.gauss(0, 0.075)
    assert _refused(losses) == []


def test_without_skipping_a_new_level_is_taken_for_normal_after_a_while() -> None:
    losses = [3.0 + 0.01 * math.sin(s) for s in range(200)] + [
        4.0 + 0.01 * math.sin(s) for s in range(900)
    ]
    verdicts = _verdicts(losses, [1.0] * len(losses), StabilityConfig())
    assert all(verdict.accept for verdict in verdicts)
    assert not verdicts[200].is_calm
    assert verdicts[-1].is_calm


def test_state_goes_on_where_it_was() -> None:
    losses = _descent(200)
    losses[150] += 3.0
    whole = _verdicts(losses, [1.0] * 200, SKIPPING)
    first, second = Judge(SKIPPING, OptimConfig()), Judge(SKIPPING, OptimConfig())
    for loss in losses[:100]:
        first.verdict(torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0))
    for name, tensor in first.state_dict().items():
        second.state_dict()[name].copy_(tensor)
    for step in range(100, 200):
        verdict = second.verdict(torch.tensor(losses[step], dtype=torch.float64), torch.tensor(1.0))
        assert float(verdict.loss_score) == float(whole[step].loss_score)


def test_zclip_equals_its_definition() -> None:
    """ZClip, arXiv 2504.02507: m and s over clipped norms, limit m + 2.5^2 / z s."""
    draw = random.Random(2)
    norms = [abs(draw.gauss(1.0, 0.1)) for _ in range(60)]
    norms[40], norms[50] = 5.0, 2.0
    state, mean, variance = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    for step, norm in enumerate(norms):
        limit, state = zclip_limit(torch.tensor(norm, dtype=torch.float64), state)
        if step < ZCLIP_WARMUP:
            seen = norms[: step + 1]
            mean, variance = statistics.fmean(seen), statistics.pvariance(seen)
            assert float(limit) == math.inf
        else:
            score = (norm - mean) / (variance**0.5 + 1e-6)
            wanted = mean + 2.5**2 / score * (variance**0.5 + 1e-6) if score > 2.5 else math.inf
            assert float(limit) == pytest.approx(wanted)
            kept = min(norm, wanted)
            mean = 0.97 * mean + 0.03 * kept
            variance = 0.97 * variance + 0.03 * (kept - mean) ** 2
        assert state[1:].tolist() == pytest.approx([mean, variance], abs=1e-12)


def test_zclip_is_only_ever_tighter_than_the_fixed_limit() -> None:
    config = OptimConfig(clip_rule="zclip", grad_clip=1.5)
    judge = Judge(StabilityConfig(), config)
    loss = torch.tensor(1.0, dtype=torch.float64)
    limits = [
        float(judge.verdict(loss, torch.tensor(norm)).max_norm)
        for norm in [1.0, 1.1, 0.9] * 10 + [50.0, 2.0]
    ]
    assert limits[:30] == [1.5] * 30
    assert 0.9 < limits[30] < 1.5


REFUSED, ACCEPTED = torch.tensor(False), torch.tensor(True)


def _muon() -> tuple[Muon, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 6, generator=generator).requires_grad_()
    return Muon([weight], lr=0.1, weight_decay=0.1, dtype=torch.float32), weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.0])
def test_muon_refuses_on_the_device(bad: float) -> None:
    muon, weight = _muon()
    weight.grad = torch.ones_like(weight)
    muon.step()
    before, momentum = weight.detach().clone(), muon.state[weight]["momentum"].clone()
    weight.grad = torch.full_like(weight, bad)
    muon.step(accept=REFUSED)
    assert torch.equal(weight, before)
    assert torch.equal(muon.state[weight]["momentum"], momentum)


def test_muon_accepts_as_without_a_verdict() -> None:
    (plain, weight), (judged, same) = _muon(), _muon()
    for step in range(3):
        weight.grad = same.grad = torch.randn(
            3, 8, 6, generator=torch.Generator().manual_seed(step)
        )
        plain.step()
        judged.step(accept=ACCEPTED)
    assert torch.equal(weight, same)


def test_adamw_obeys_the_verdict_on_the_device() -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    one, other = (torch.optim.AdamW([w], lr=0.1, fused=True) for w in (weight, twin))
    weight.grad, twin.grad = torch.ones(5, 4), torch.ones(5, 4)
    step_adamw(one, ACCEPTED)
    other.step()
    weight.grad = torch.full((5, 4), float("nan"))
    step_adamw(one, REFUSED)
    assert torch.equal(weight, twin)
    for key, value in other.state[twin].items():
        assert torch.equal(one.state[weight][key], value), key
    weight.grad, twin.grad = torch.ones(5, 4), torch.ones(5, 4)
    step_adamw(one, ACCEPTED)
    other.step()
    assert torch.equal(weight, twin)


def test_biases_stay_where_a_step_is_refused() -> None:
    layer, load_LE = (
        SimpleNamespace(router=SigmoidRouter(8, 4, 2, 1.0)),
        torch.tensor([[9, 1, 1, 1]]),
    )
    config = BalanceConfig()
    move_biases([(0, layer)], load_LE, config, REFUSED)
    assert not layer.router.expert_bias.any()
    move_biases([(0, layer)], load_LE, config, ACCEPTED)
    zeros = torch.zeros(4)
    wanted, _ = smebu(zeros, zeros, load_LE[0].float(), step=5e-4, decay=0.5, sharpness=2.0)
    assert torch.equal(layer.router.expert_bias, wanted)
