"""Flow matching against closed forms: identities, Gaussian mixtures, orders of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from trinity.core.draws import Stream, normal_by_row
from trinity.core.errors import ConfigError
from trinity.models.flow import (
    SigmaDensity,
    ancestral,
    clean_from,
    euler,
    flow_loss,
    guided,
    heun,
    interpolate,
    loss_weight,
    noise_from,
    sampling_sigmas,
    shift_sigma,
    training_sigmas,
    velocity_target,
)

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64)
STD = 0.5
ROWS = range(6)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mixture_velocity(z: Tensor, sigma: float) -> Tensor:
    """E[eps - x | z] where every element of x is of the mixture, independently."""
    alpha = 1 - sigma
    variance = alpha**2 * STD**2 + sigma**2
    away = z[..., None] - alpha * MEANS
    share = torch.softmax(WEIGHTS.log() - away**2 / (2 * variance), -1)
    return (share * ((sigma - alpha * STD**2) / variance * away - MEANS)).sum(-1)


def _gaussian_velocity(mean: float, std: float) -> Callable[[Tensor, float], Tensor]:
    def velocity(z: Tensor, sigma: float) -> Tensor:
        alpha = 1 - sigma
        slope = (sigma - alpha * std**2) / (alpha**2 * std**2 + sigma**2)
        return slope * (z - alpha * mean) - mean

    return velocity


def test_latents_and_velocity_give_back_data_and_noise() -> None:
    x, eps = _normal(5, 3, 4), _normal(5, 3, 4, seed=1)
    sigma_B = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    z, v = interpolate(x, eps, sigma_B), velocity_target(x, eps)
    assert torch.equal(z[0], x[0])
    assert torch.equal(z[4], eps[4])
    assert_close(z[1], 0.75 * x[1] + 0.25 * eps[1])
    assert_close(clean_from(z, v, sigma_B), x)
    assert_close(noise_from(z, v, sigma_B), eps)
    assert_close(clean_from(z[3:4], v[3:4], 0.9), x[3:4])
    assert_close(noise_from(z[3:4], v[3:4], 0.9), eps[3:4])


def test_velocity_is_the_derivative_of_the_path() -> None:
    x, eps = _normal(2, 7), _normal(2, 7, seed=1)
    sigma_B = torch.tensor([0.3, 0.5], dtype=torch.float64)
    slope = (interpolate(x, eps, sigma_B + 0.25) - interpolate(x, eps, sigma_B)) / 0.25
    assert_close(slope, velocity_target(x, eps))


def test_sigma_is_not_rounded_to_the_dtype_of_the_data() -> None:
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    z = interpolate(x, 0 * x, torch.tensor([0.001]))  # 1 - 0.001 is 1 in bf16
    assert_close(z, torch.full((1, 2), 0.999))


@pytest.mark.parametrize("parts", [[ROWS], [[0, 1, 2], [3, 4, 5]], [[4], [1, 5, 3], [0, 2]]])
def test_draws_do_not_depend_on_who_draws(parts: list[list[int]]) -> None:
    density = SigmaDensity(shift=3.0)
    noise = torch.empty(6, 3, 5)
    sigma_B = torch.empty(6)
    for part in parts:
        noise[list(part)] = normal_by_row(7, 11, part, (3, 5), Stream.NOISE)
        sigma_B[list(part)] = training_sigmas(7, 11, part, density)
    assert torch.equal(noise, normal_by_row(7, 11, ROWS, (3, 5), Stream.NOISE))
    assert torch.equal(sigma_B, training_sigmas(7, 11, ROWS, density))


def test_logit_normal_moments() -> None:
    fraction = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = SigmaDensity(mean=-0.4, std=1.3).quantile(fraction).logit()
    assert_close(float(logits.mean()), -0.4, atol=1e-6, rtol=0)
    assert_close(float(logits.std()), 1.3, atol=1e-3, rtol=0)
    shifted = SigmaDensity(mean=-0.4, std=1.3, shift=3.0).quantile(fraction).logit()
    assert_close(shifted, logits + math.log(3))
    ends = SigmaDensity().quantile(torch.tensor([2.0**-53, 1.0], dtype=torch.float64))
    assert bool(ends.isfinite().all())
    assert_close(SigmaDensity("uniform").quantile(fraction), fraction)


def test_training_sigmas_follow_the_density() -> None:
    drawn = training_sigmas(5, 2, range(2000), SigmaDensity(mean=0.5, std=0.8)).logit()
    assert_close(float(drawn.mean()), 0.5, atol=0.06, rtol=0)
    assert_close(float(drawn.std()), 0.8, atol=0.05, rtol=0)


def test_shift_identities() -> None:
    sigma = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert_close(shift_sigma(sigma, 1.0), sigma)
    assert_close(shift_sigma(shift_sigma(sigma, 3.0), 1 / 3), sigma)
    assert_close(shift_sigma(shift_sigma(sigma, 3.0), 1.5), shift_sigma(sigma, 4.5))
    assert_close(shift_sigma(sigma, 3.0)[[0, 10, 20]], sigma.new_tensor([0, 0.75, 1]))
    mu, inner = 1.15, sigma[1:-1]
    assert_close(shift_sigma(inner, math.exp(mu)), math.exp(mu) / (math.exp(mu) + 1 / inner - 1))


def test_sampling_sigmas() -> None:
    assert sampling_sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert_close(sampling_sigmas(2, 3.0), [1.0, 0.75, 0.0])
    sigmas = torch.tensor(sampling_sigmas(50, 3.0), dtype=torch.float64)
    assert bool((sigmas.diff() < 0).all())
    # Third differences of latents show those of a shifted schedule: about 4.6e-4 for 50 steps.
    assert_close(float(sigmas.diff(n=3).abs().max()), 4.6e-4, atol=5e-6, rtol=0)


def test_weightings() -> None:
    sigma_B = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    assert_close(loss_weight(sigma_B, "none"), sigma_B.new_tensor([1, 1, 1]))
    assert_close(loss_weight(sigma_B, "sigma_sqrt"), sigma_B.new_tensor([100, 4, 1]))
    cosmap = sigma_B.new_tensor([2 / 0.82, 4, 2]) / math.pi
    assert_close(loss_weight(sigma_B, "cosmap"), cosmap)


def test_loss_by_hand() -> None:
    predicted = torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]], requires_grad=True)
    sigma_B = torch.tensor([0.5, 1.0])
    loss = flow_loss(predicted, torch.zeros(2, 1, 2), sigma_B, "sigma_sqrt")
    assert_close(loss.squared_error_B, torch.tensor([5.0, 2.0]))
    assert_close(loss.squared_error, torch.tensor(7.0))
    assert_close(loss.total, torch.tensor(4 * 5.0 + 2.0))
    loss.total.backward()
    assert_close(predicted.grad, torch.tensor([[[4.0, 12.0]], [[0.0, 2.0]]]))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_loss_does_not_depend_on_the_microbatches(weighting: str) -> None:
    target, sigma_B = _normal(6, 4, seed=1), torch.linspace(0.1, 1, 6, dtype=torch.float64)
    gradients, totals = [], []
    for edges in ([0, 6], [0, 1, 6], [0, 2, 4, 5, 6]):
        predicted = _normal(6, 4).requires_grad_()
        parts = [
            flow_loss(predicted[a:b], target[a:b], sigma_B[a:b], weighting)
            for a, b in pairwise(edges)
        ]
        total = torch.stack([part.total for part in parts]).sum()
        total.backward()
        totals.append(torch.stack([total, *[sum(part.squared_error for part in parts)]]))
        gradients.append(predicted.grad)
    for other, gradient in zip(totals[1:], gradients[1:], strict=True):
        assert_close(other, totals[0])
        assert_close(gradient, gradients[0])


def test_loss_of_bf16_is_computed_wider() -> None:
    predicted = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    loss = flow_loss(predicted, torch.full((1, 4096), 0.999), torch.ones(1))
    assert loss.total.dtype == torch.float32
    assert_close(float(loss.total), 1e-6, atol=0, rtol=1e-3)


def test_euler_is_the_flow_match_euler_scheduler() -> None:
    """As diffusers' scheduler steps when it is given sigmas from 1 to 1/n, the last step to 0."""
    num_steps, shift = 7, 3.0
    plain = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    sigmas = torch.cat([shift * plain / (1 + (shift - 1) * plain), plain.new_zeros(1)])
    sample = _normal(2, 3)
    by_hand = [sample]
    for i in range(num_steps):
        model_output = _mixture_velocity(sample, float(sigmas[i]))
        sample = sample + (sigmas[i + 1] - sigmas[i]) * model_output
        by_hand.append(sample)
    history = list(euler(_mixture_velocity, by_hand[0], sampling_sigmas(num_steps, shift)))
    assert_close(torch.stack(history), torch.stack(by_hand))


def _cdf_errors(solver: Callable[..., object], num_steps: list[int], shift: float) -> list[float]:
    """In one dim the exact flow keeps quantiles: compare them at the end with the start's."""
    z = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    errors = []
    for steps in num_steps:
        *_, last = solver(_mixture_velocity, z, sampling_sigmas(steps, shift))
        quantile = (WEIGHTS * torch.special.ndtr((last - MEANS) / STD)).sum(-1)
        errors.append(float((quantile - torch.special.ndtr(z[:, 0])).abs().max()))
    return errors


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver: Callable[..., object], order: int, shift: float) -> None:
    errors = _cdf_errors(solver, [100, 200, 400], shift)
    for coarse, fine in pairwise(errors):
        assert_close(math.log2(coarse / fine), float(order), atol=0.1, rtol=0)
    assert errors[-1] < {1: 3e-3, 2: 1e-5}[order]


def test_a_constant_velocity_needs_one_step() -> None:
    x, eps = _normal(2, 3), _normal(2, 3, seed=1)
    for solver in (euler, heun):
        history = list(solver(lambda z, sigma: eps - x, eps, [1.0, 0.0]))
        assert_close(torch.stack(history), torch.stack([eps, x]))


def test_rising_sigmas_lead_back() -> None:
    z = _normal(3, 4)
    sigmas = sampling_sigmas(200)
    *_, data = heun(_mixture_velocity, z, sigmas)
    *_, again = heun(_mixture_velocity, data, sigmas[::-1])
    assert_close(again, z, atol=1e-3, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sde_and_ode_have_the_same_marginals_at_every_sigma(eta: float) -> None:
    mean, std, num_steps = 0.8, 0.6, 400
    sigmas = sampling_sigmas(num_steps, 1.5)
    z = normal_by_row(1, 0, [0], (30_000,), Stream.NOISE).double()
    velocity = _gaussian_velocity(mean, std)
    history = list(ancestral(velocity, z, sigmas, seed=1, eta=eta))
    assert len(history) == num_steps + 1
    for sigma, latents in list(zip(sigmas, history, strict=True))[::40]:
        exact = math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
        standard = (latents - (1 - sigma) * mean) / exact
        assert_close(float(standard.mean()), 0.0, atol=0.03, rtol=0)
        assert_close(float(standard.var()), 1.0, atol=0.05, rtol=0)
        assert_close(float((standard**4).mean()), 3.0, atol=0.25, rtol=0)
    kept = float(torch.corrcoef(torch.cat([z, history[-1]]))[0, 1])
    if eta == 0:
        assert kept > 0.9999
    if eta == 1:
        assert abs(kept) < 0.04  # the first step from sigma 1 forgets where it came from


def test_ancestral_without_noise_is_euler() -> None:
    z, sigmas = _normal(3, 4), sampling_sigmas(9, 3.0)
    without = list(ancestral(_mixture_velocity, z, sigmas, seed=0, eta=0.0))
    assert_close(torch.stack(without), torch.stack(list(euler(_mixture_velocity, z, sigmas))))


@pytest.mark.parametrize(
    ("eta", "kept", "variance"),
    [(1.0, 0.15625, 0.234375), (0.5, math.sqrt(0.19140625) / 0.8, 0.05859375)],
)
def test_ancestral_step_is_the_posterior_of_the_path(
    eta: float, kept: float, variance: float
) -> None:
    """Data 0, from sigma 0.8 to 0.5: z of 0.5 given that of 0.8, by Bayes' rule on paper."""
    z = _normal(2, 5)
    _, after = ancestral(lambda z, sigma: z / sigma, z, [0.8, 0.5], seed=4, eta=eta)
    noise = normal_by_row(4, 0, [0, 1], (5,), Stream.SOLVER)
    assert_close(after, kept * z + math.sqrt(variance) * noise)


def test_ancestral_noise_goes_with_the_row() -> None:
    z, sigmas = _normal(6, 4), sampling_sigmas(5)
    whole = torch.stack(list(ancestral(_mixture_velocity, z, sigmas, seed=9)))
    for rows in ([0, 1, 2], [5, 3]):
        part = list(ancestral(_mixture_velocity, z[rows], sigmas, seed=9, rows=rows))
        assert torch.equal(torch.stack(part), whole[:, rows])
    other = torch.stack(list(ancestral(_mixture_velocity, z, sigmas, seed=10)))
    assert not torch.isclose(whole[1:], other[1:]).any()


class _Conditional:
    """A velocity that depends on a condition, and remembers how many rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, z: Tensor, sigma: float, condition_B: Tensor) -> Tensor:
        self.rows.append(len(z))
        return z * sigma + condition_B[:, None]


CONDITION = torch.tensor([2.0, 3.0], dtype=torch.float64)
NULL = torch.tensor([-1.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "rows", "added"),
    [(1.0, [2], [2.0, 3.0]), (0.0, [4], [-1.0, -1.0]), (2.5, [4], [6.5, 9.0])],
)
def test_guidance(scale: float, rows: list[int], added: list[float]) -> None:
    model, z = _Conditional(), _normal(2, 3)
    v = guided(model, CONDITION, NULL, scale=scale)(z, 0.5)
    assert model.rows == rows
    assert_close(v, z * 0.5 + z.new_tensor(added)[:, None])


def test_guidance_of_scale_near_one_is_near_the_conditional_one() -> None:
    z = _normal(2, 3)
    exact = guided(_Conditional(), CONDITION, NULL, scale=1.0)(z, 0.5)
    assert torch.equal(exact, _Conditional()(z, 0.5, CONDITION))
    near = guided(_Conditional(), CONDITION, NULL, scale=1 + 1e-9)(z, 0.5)
    assert_close(near, exact, atol=1e-7, rtol=0)


def test_guidance_only_within_its_interval() -> None:
    model, z = _Conditional(), _normal(2, 3)
    velocity = guided(model, CONDITION, NULL, scale=2.0, interval=(0.25, 0.5))
    last = list(euler(velocity, z, sampling_sigmas(4)))[-1]
    assert model.rows == [2, 2, 4, 4]  # sigmas 1, 0.75, 0.5, 0.25
    assert last.shape == z.shape


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SigmaDensity("cosine"), "'cosine' is unknown; choose one of uniform"),
        (lambda: SigmaDensity(std=0.0), "std=0.0"),
        (lambda: SigmaDensity(mean=math.nan), "mean=nan"),
        (lambda: SigmaDensity(shift=0.0), "shift=0.0"),
        (lambda: loss_weight(torch.ones(1), "snr"), "'snr' is unknown; choose one of none"),
        (lambda: sampling_sigmas(0), "num_steps=0"),
        (lambda: sampling_sigmas(5, -1.0), "shift=-1.0"),
        (lambda: list(ancestral(_mixture_velocity, NULL, [1.0], seed=0, eta=2)), "eta=2"),
        (lambda: list(ancestral(_mixture_velocity, NULL, [0.5, 0.6], seed=0)), "must fall"),
        (lambda: guided(_Conditional(), NULL, NULL, scale=math.inf), "scale=inf"),
        (lambda: guided(_Conditional(), NULL, NULL, scale=2, interval=(0.5, 0.2)), "interval="),
    ],
)
def test_mistakes_are_told(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()
