"""Sampling with a patch size per step and sample, chosen by a rule or fixed beforehand.

``PatchedVelocity`` takes the place of a model in the solvers of ``flow``: at every call it asks a
policy for sizes, runs one forward per size in use, and keeps the record. ``PatchPath`` is the part
that remembers; whoever owns the loop himself can ask it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.models.flow import Velocity, euler
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_hosts import PatchGeometry, PatchHost
from trinity.models.patch_scheduler import PatchDecision
from trinity.models.patching import Upsampling, pool_snr_matched, velocity_from_pooled

NUM_LATENTS_KEPT = 4
"""Latents that a third difference reads."""

GroupVelocity = Callable[[Tensor, float, int, Tensor], Tensor]
"""Velocity of latents (N, ...) at one noise level and scale; the last argument (N,) holds the rows
of the batch they are."""

Solver = Callable[[Velocity, Tensor, Sequence[float]], Iterator[Tensor]]


class PatchPolicy(Protocol):
    """Chooses sizes step by step; ``PatchScheduler`` is one."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes it may choose, rising, the first one 1."""
        ...

    def first(self, num_samples: int, device: torch.device | str = "cpu") -> PatchDecision:
        """The decision that ``decide`` for step 0 is given as the one before."""
        ...

    def decide(
        self,
        previous: PatchDecision,
        latents: Sequence[Tensor],
        sigmas: Sequence[float],
        *,
        step: int,
        num_steps: int,
    ) -> PatchDecision:
        """Sizes for ``step``, whose input is the last of ``latents`` (oldest first)."""
        ...


@dataclass(frozen=True)
class FixedSplit:
    """Coarse first, then finer, at steps fixed beforehand: what a chosen size is measured against.

    (The inference of "FlexiDiT", 2025; with one stage, a weak model for the first steps.)
    """

    stages: tuple[tuple[int, float], ...]
    """(size, share of the steps) in order; steps that are left run at the base patch."""

    def __post_init__(self) -> None:
        """Raises ConfigError for shares or sizes that cannot be."""
        shares = [share for _, share in self.stages]
        if any(size < 1 for size, _ in self.stages) or min(shares, default=0) < 0:
            raise ConfigError(f"fixed split: stages = {self.stages}: use sizes and shares above 0")
        if sum(shares) > 1 + 1e-9:
            raise ConfigError(f"fixed split: stages = {self.stages}: shares add up to more than 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in use, rising, and 1."""
        return tuple(sorted({1, *(size for size, _ in self.stages)}))

    def first(self, num_samples: int, device: torch.device | str = "cpu") -> PatchDecision:
        """The base patch, before any step."""
        return self._all(1, torch.ones(num_samples, dtype=torch.int64, device=device))

    def decide(
        self,
        previous: PatchDecision,
        latents: Sequence[Tensor],
        sigmas: Sequence[float],
        *,
        step: int,
        num_steps: int,
    ) -> PatchDecision:
        """The size of the stage that ``step`` lies in; the path is not looked at."""
        share_gone = 0.0
        for size, share in self.stages:
            share_gone += share
            if step < round(share_gone * num_steps):
                return self._all(size, previous.scale_B)
        return self._all(1, previous.scale_B)

    def _all(self, size: int, like_B: Tensor) -> PatchDecision:
        unknown = torch.full((len(like_B), len(self.sizes) - 1), torch.nan, device=like_B.device)
        same_B = torch.full_like(like_B, size)
        return PatchDecision(same_B, torch.ones_like(same_B), unknown)


class PatchRecord(NamedTuple):
    """What a run has used. K counts steps."""

    scale_KB: Tensor
    statistic_KBS: Tensor
    """What was decided on; NaN where nothing was known."""
    tokens_KB: Tensor
    """Image tokens that went through the model; with guidance, twice each."""


class PatchPath:
    """Latents, noise levels and decisions of one run, as far as the next decision needs them."""

    def __init__(self, policy: PatchPolicy, num_steps: int) -> None:
        self.policy, self.num_steps = policy, num_steps
        self.decisions: list[PatchDecision] = []
        """One per step so far."""
        self._latents: list[Tensor] = []
        self._sigmas: list[float] = []

    @property
    def step(self) -> int:
        """Number of the step decided last; -1 before the first."""
        return len(self.decisions) - 1

    def continues(self, z: Tensor, sigma: float) -> bool:
        """Whether these latents can belong to the run: sigma not risen, shape unchanged."""
        known = bool(self._sigmas)
        return known and sigma <= self._sigmas[-1] and self._latents[-1].shape == z.shape

    def is_same_step(self, sigma: float) -> bool:
        """Whether a call at ``sigma`` is part of the step decided last."""
        return bool(self._sigmas) and sigma == self._sigmas[-1]

    def decide(self, z: Tensor, sigma: float) -> PatchDecision:
        """Sizes for a call at ``z``.

        A call at the noise level of the call before is part of the same step (the other half of a
        guided pair, the corrector of a two-stage solver): it gets the same sizes, and its latents
        replace those known. Raises ConfigError as ``PatchScheduler.statistic`` does.
        """
        z = z.detach().clone()  # loops may write into their latents
        if self.is_same_step(sigma):
            self._latents[-1] = z
            return self.decisions[-1]
        previous = self.decisions[-1] if self.decisions else self.policy.first(len(z), z.device)
        self._latents = [*self._latents[1 - NUM_LATENTS_KEPT :], z]
        self._sigmas = [*self._sigmas[1 - NUM_LATENTS_KEPT :], sigma]
        decision = self.policy.decide(
            previous,
            self._latents,
            self._sigmas,
            step=len(self.decisions),
            num_steps=self.num_steps,
        )
        self.decisions.append(decision)
        return decision

    def record(self, num_tokens: int) -> PatchRecord:
        """What was used so far; ``num_tokens`` is the tokens of a latent at the base patch."""
        scale_KB = torch.stack([decision.scale_B for decision in self.decisions])
        statistic_KBS = torch.stack([decision.statistic_BS for decision in self.decisions])
        return PatchRecord(scale_KB, statistic_KBS, num_tokens // scale_KB.square())


class PatchedVelocity:
    """A ``flow.Velocity`` with a size per sample: one forward per size in use. For one run."""

    def __init__(self, velocity: GroupVelocity, policy: PatchPolicy, num_steps: int) -> None:
        self._velocity = velocity
        self.path = PatchPath(policy, num_steps)

    def __call__(self, z: Tensor, sigma: float) -> Tensor:
        """Velocity (B, ...) of latents that all have the same sigma. Waits for the device."""
        return by_groups(self._velocity, self.path.decide(z, sigma).groups(), z, sigma)


def by_groups(
    velocity: GroupVelocity, groups: list[tuple[int, Tensor]], z: Tensor, sigma: float
) -> Tensor:
    """Velocity of all rows, each at the size of its group; see ``PatchDecision.groups``."""
    if len(groups) == 1:
        return velocity(z, sigma, *groups[0])
    parts = [velocity(z[rows_N], sigma, scale, rows_N) for scale, rows_N in groups]
    order = torch.cat([rows_N for _, rows_N in groups])
    return torch.cat(parts)[order.argsort()]


class PatchedSample(NamedTuple):
    """A finished run."""

    latents: list[Tensor]
    """At every noise level, the first one included."""
    record: PatchRecord


def sample(
    velocity: GroupVelocity,
    z: Tensor,
    sigmas: Sequence[float],
    policy: PatchPolicy,
    geometry: PatchGeometry,
    *,
    solver: Solver = euler,
) -> PatchedSample:
    """Run a solver of ``flow`` from ``z`` along ``sigmas`` with sizes from ``policy``.

    Latents are kept in float32 or wider by the caller. Raises ConfigError for latents in half
    precision or that patches do not divide.
    """
    patched = PatchedVelocity(velocity, policy, len(sigmas) - 1)
    latents = list(solver(patched, z, sigmas))
    return PatchedSample(latents, patched.path.record(geometry.num_tokens(tuple(z.shape[2:]))))


def adapter_velocity(
    adapter: PatchAdapter,
    condition: Any,
    *,
    null_condition: Any = None,
    guidance_scale: float = 1.0,
) -> GroupVelocity:
    """Velocity of an adapter under ``condition``, one entry per row of the batch.

    With a ``null_condition`` and a ``guidance_scale`` other than 1 it is guided: two forwards per
    group, at one size.
    """
    host = adapter.host

    def velocity(z: Tensor, sigma: float, scale: int, rows_N: Tensor) -> Tensor:
        sigma_N = torch.full((len(z),), sigma, dtype=torch.float64)
        with_condition = adapter(z, sigma_N, host.take(condition, rows_N), scale)
        if null_condition is None or guidance_scale == 1:
            return with_condition
        without = adapter(z, sigma_N, host.take(null_condition, rows_N), scale)
        return without + guidance_scale * (with_condition - without)

    return velocity


def pooled_velocity(
    host: PatchHost, condition: Any, *, upsampling: Upsampling = "bilinear"
) -> GroupVelocity:
    """Coarse velocities of a model without any new weights, from pooled latents.

    The base model runs at its own patch on a latent pooled so that it is again one of the flow
    (``patching.pool_snr_matched``). Serves high noise only: pair it with ``FixedSplit``.
    """

    def velocity(z: Tensor, sigma: float, scale: int, rows_N: Tensor) -> Tensor:
        sigma_N = torch.full((len(z),), sigma, dtype=torch.float64)
        taken = host.take(condition, rows_N)
        if scale == 1:
            return host.velocity(z, sigma_N, taken)
        sigma_N = sigma_N.to(z)
        pooled = pool_snr_matched(z, sigma_N, scale)
        coarse = host.velocity(pooled.latent, pooled.sigma_B, taken, spacing=scale)
        return velocity_from_pooled(z, sigma_N, pooled, coarse.to(z.dtype), upsampling=upsampling)

    return velocity


def check_fit(adapter: PatchAdapter, policy: PatchPolicy) -> None:
    """Raise ConfigError when a policy would choose sizes the adapter lacks, or measures others."""
    missing = sorted(set(policy.sizes) - set(adapter.scales))
    if missing:
        raise ConfigError(
            f"patch scheduler: sizes {missing} are not among the adapter's scales "
            f"{adapter.scales}: leave them out, or train an adapter that has them"
        )
    patch = adapter.host.geometry.patch
    base_patch = getattr(policy, "base_patch", patch)
    if base_patch != patch:
        raise ConfigError(
            f"patch scheduler: base_patch = {base_patch}, but the model's patch is {patch} latent "
            "pixels wide: use that"
        )
