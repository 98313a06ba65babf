"""Flow matching without a model: path, training draws, loss, sampling schedule, solvers, guidance.

The path is rectified flow's straight line between data x and Gaussian noise eps,

    z = (1 - sigma) * x + sigma * eps,        v = dz/dsigma = eps - x,

so sigma is 0 at the data and 1 at the noise, and a sampler integrates a velocity from 1 down to 0.
Tensors are (B, ...) with any dims after the rows; ``sigma_B`` has one entry per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from trinity.core.draws import Stream, normal_by_row, uniform_by_row
from trinity.core.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]
"""Velocity at latents (B, ...) that all have the same sigma. The sigma is a number of the host, so
that choices which depend on it never wait for the device."""

ConditionalVelocity = Callable[[Tensor, float, Tensor], Tensor]
"""The same, given a condition per row (class ids (B,) or embeddings (B, ...))."""

Density = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def interpolate(x: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """The latents z at ``sigma`` on the lines from data ``x`` to noise ``eps``."""
    sigma = _over_dims(sigma, x)
    return (1 - sigma) * x + sigma * eps


def velocity_target(x: Tensor, eps: Tensor) -> Tensor:
    """The velocity v of the path, the same at every sigma; what a model is trained to predict."""
    return eps - x


def clean_from(z: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The data x that latents ``z`` and a velocity ``v`` at ``sigma`` point to."""
    return z - _over_dims(sigma, z) * v


def noise_from(z: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The noise eps that latents ``z`` and a velocity ``v`` at ``sigma`` point to."""
    return z + (1 - _over_dims(sigma, z)) * v


def _over_dims(sigma: Tensor | float, z: Tensor) -> Tensor | float:
    """One sigma per row against all dims of ``z``. Not rounded to a narrower dtype of ``z``."""
    if isinstance(sigma, Tensor):
        assert sigma.shape == z.shape[:1], (sigma.shape, z.shape)
        return sigma.reshape(-1, *[1] * (z.ndim - 1))
    return sigma


def shift_sigma(sigma: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Move sigmas in [0, 1] towards the noise (``shift`` > 1) or the data (< 1); 0 and 1 stay.

    Adds log(shift) to the logit of sigma: two shifts in a row are one by their product, and
    1/shift undoes it. Models with a "mu" that depends on the resolution mean shift = exp(mu).
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class SigmaDensity:
    """How often training visits each sigma.

    ``logit_normal`` draws logit(sigma) from a normal distribution with ``mean`` and ``std``;
    ``uniform`` has no use for these. Both are then shifted, see :func:`shift_sigma`. Raises
    ConfigError for a value that gives no density.
    """

    kind: Density = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        _check_choice("density of sigma", self.kind, get_args(Density))
        _check_shift(self.shift)
        if not math.isfinite(self.mean):
            raise ConfigError(f"mean={self.mean} of the sigmas' logits must be finite")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ConfigError(f"std={self.std} of the sigmas' logits must be finite and above 0")

    def quantile(self, fraction: Tensor) -> Tensor:
        """The sigma below which ``fraction`` of the draws lie; uniform fractions give draws."""
        sigma = fraction
        if self.kind == "logit_normal":
            sigma = torch.sigmoid(self.mean + self.std * torch.special.ndtri(fraction))
        return shift_sigma(sigma, self.shift)


def training_sigmas(seed: int, step: int, rows: Sequence[int], density: SigmaDensity) -> Tensor:
    """Sigmas to train the rows at, (len(rows),) fp32; see :func:`uniform_by_row` for ``rows``."""
    return density.quantile(uniform_by_row(seed, step, rows, Stream.SIGMA)).float()


def loss_weight(sigma_B: Tensor, weighting: Weighting) -> Tensor:
    """Factor on the squared error of the velocity, per row: the weightings of Stable Diffusion 3.

    ``none`` is 1. ``sigma_sqrt`` is sigma^-2; it has no bound near the data, so it wants a density
    that seldom goes there. ``cosmap`` is 2 / (pi * (1 - 2 sigma + 2 sigma^2)): 4/pi in the middle,
    half of that at both ends. Raises ConfigError for any other name.
    """
    _check_choice("weighting", weighting, get_args(Weighting))
    if weighting == "sigma_sqrt":
        return sigma_B**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)


class FlowLoss(NamedTuple):
    """Sums over the rows of a microbatch; the caller divides by the rows of the whole step.

    Divided so, the loss and its gradient do not depend on how rows are split over microbatches and
    processes.
    """

    total: Tensor
    """Sum of weighted errors, scalar; the only one that carries a gradient."""
    squared_error: Tensor
    """Sum of the errors without weights, comparable between weightings."""
    squared_error_B: Tensor
    """Error of every row without weight: the mean square over the row's elements."""


def flow_loss(
    predicted: Tensor, target: Tensor, sigma_B: Tensor, weighting: Weighting = "none"
) -> FlowLoss:
    """Squared error of a predicted velocity, in sums over rows, computed in fp32 or wider.

    An error is a mean over the elements of its row: rows of few and of many elements count alike.
    """
    assert predicted.shape == target.shape, (predicted.shape, target.shape)
    exact = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    error_B = (predicted.to(exact) - target.to(exact)).square().flatten(1).mean(1)
    total = (loss_weight(sigma_B.to(exact), weighting) * error_B).sum()
    plain_B = error_B.detach()
    return FlowLoss(total, plain_B.sum(), plain_B)


def sampling_sigmas(num_steps: int, shift: float = 1.0) -> list[float]:
    """The ``num_steps`` + 1 sigmas of a sampler, evenly spaced from 1 to 0 and then shifted.

    Solvers take any other list as well, for instance one that ends above 0.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps={num_steps} of a sampler must be at least 1")
    _check_shift(shift)
    return [shift_sigma(1 - step / num_steps, shift) for step in range(num_steps + 1)]


def euler(velocity: Velocity, z: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Integrate dz/dsigma = velocity with steps of first order, one evaluation each.

    Yields the latents at every sigma, ``z`` itself first. Rising sigmas turn data into its noise.
    Latents keep the dtype of ``z``: give fp32, in bf16 the sum over many steps loses digits. The
    solvers leave inference mode to the caller.
    """
    yield z
    for sigma, after in pairwise(sigmas):
        z = z + (after - sigma) * velocity(z, sigma).to(z.dtype)
        yield z


def heun(velocity: Velocity, z: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """As :func:`euler`, with steps of second order (trapezoid), two evaluations each.

    The last step is one too: a velocity, unlike a score, is finite at sigma 0.
    """
    yield z
    for sigma, after in pairwise(sigmas):
        here = velocity(z, sigma).to(z.dtype)
        there = velocity(z + (after - sigma) * here, after).to(z.dtype)
        z = z + (after - sigma) / 2 * (here + there)
        yield z


def ancestral(
    velocity: Velocity,
    z: Tensor,
    sigmas: Sequence[float],
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """Sample with noise: the SDE whose distribution at every sigma is that of the ODE.

    A step goes to the estimated data and puts noise back: partly the estimated noise, partly new
    noise, together as much as the path has at the next sigma. At ``eta`` 1 the new part is that of
    the path's own posterior (variance 2 sigma / (1 - sigma) per unit of sigma in the limit of small
    steps); 0 is Euler's method. First order. Yields as :func:`euler`, one evaluation per step.

    Args:
        velocity: of the latents.
        z: latents at ``sigmas[0]``.
        sigmas: falling, within [0, 1].
        seed: of the new noise, which is a function of seed, step and row alone.
        rows: numbers of the rows, 0, 1, ... by default; give them where the rows of one batch are
            split over processes.
        eta: share of the new noise, 0 to 1.

    Raises:
        ConfigError: when the first latents are asked for, if ``sigmas`` or ``eta`` are not so.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} must be in [0, 1]; 0 adds no noise")
    if any(not 0 <= after < sigma <= 1 for sigma, after in pairwise(sigmas)):
        raise ConfigError(f"sigmas={list(sigmas)} must fall within [0, 1]; see sampling_sigmas")
    rows = range(len(z)) if rows is None else rows
    assert len(rows) == len(z), (len(rows), len(z))
    yield z
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        v = velocity(z, sigma).to(z.dtype)
        x, eps = clean_from(z, v, sigma), noise_from(z, v, sigma)
        new = eta * _posterior_std(sigma, after)
        z = (1 - after) * x + math.sqrt(max(after**2 - new**2, 0.0)) * eps
        if new > 0:
            noise = normal_by_row(seed, step, rows, z.shape[1:], Stream.SOLVER)
            z = z + new * noise.to(z)
        yield z


def _posterior_std(sigma: float, after: float) -> float:
    """Std of z at ``after`` given z at ``sigma`` > ``after`` and the data."""
    carried = (1 - sigma) / (1 - after) * after  # what the noise at `after` becomes at `sigma`
    return after / sigma * math.sqrt(max(sigma - carried, 0.0) * (sigma + carried))


def guided(
    velocity: ConditionalVelocity,
    condition: Tensor,
    null_condition: Tensor,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance: ``scale`` times the way from no condition to the condition.

    ``scale`` 1 is the condition alone, 0 none, more than 1 overdoes it. Outside the sigmas of
    ``interval`` (both ends inclusive) the scale is 1. Where it is 1 a call costs one batch,
    elsewhere one batch of twice the rows, conditional ones first. ``null_condition`` has the shape
    of ``condition``. Raises ConfigError for a scale or an interval that cannot be.
    """
    low, high = interval
    if not math.isfinite(scale):
        raise ConfigError(f"guidance scale={scale} must be finite; 1 is no guidance")
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval={interval} must be (low, high) within [0, 1]")
    assert condition.shape == null_condition.shape, (condition.shape, null_condition.shape)
    both = torch.cat([condition, null_condition])

    def combined(z: Tensor, sigma: float) -> Tensor:
        if scale == 1 or not low <= sigma <= high:
            return velocity(z, sigma, condition)
        with_condition, without = velocity(torch.cat([z, z]), sigma, both).chunk(2)
        return without + scale * (with_condition - without)

    return combined


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{what} {value!r} is unknown; choose one of {', '.join(choices)}")


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift={shift} must be finite and above 0; 1 shifts nothing")
