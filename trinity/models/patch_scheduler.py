"""Which patch size each denoising step can afford, from how sharply the latent's path bends.

After every step the third difference of the last four latents is cut into blocks of each candidate
size. Where its spread inside a block is small, one coarse token can follow the path; the largest
size whose spread stays below a threshold is used for the next step (dynamic patch scheduling,
"DDiT", 2026). No network is involved: a decision is a function of latents, noise levels and the
decision before it, for every sample of a batch alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trinity.core.errors import ConfigError

REFERENCE_STEPS = 50
"""Thresholds are told for this many uniform steps: a third difference falls with the cube of the
step, and published thresholds (0.001) belong to 50 steps."""

Normalization = Literal["divided", "raw"]
ChannelReduction = Literal["joint", "per_channel_mean"]


@dataclass(frozen=True)
class PatchDecision:
    """Patch sizes of one step, and what they were decided on (for the log and calibration)."""

    scale_B: Tensor
    """Patch size in units of the base patch, int64: 1 is the base model itself."""
    held_B: Tensor
    """Steps since the last switch, this one included."""
    statistic_BS: Tensor
    """Spread per sample and coarse size, in the order of ``PatchScheduler.sizes`` without 1;
    NaN while too few latents are known."""

    def groups(self) -> list[tuple[int, Tensor]]:
        """(scale, sample indices) of every size in use: one forward pass each. Waits for the
        device."""
        scales = sorted(set(self.scale_B.tolist()))
        return [(scale, (self.scale_B == scale).nonzero().flatten()) for scale in scales]


@dataclass(frozen=True)
class PatchScheduler:
    """The rule and its constants.

    The statistic of the path up to a step decides the *next* step. A switch bends the path by
    itself, because the coarse velocity differs from the fine one, and that bend stays in sight for
    ``order`` steps: without ``hold`` the sizes chatter (three fine steps, one coarse, and again).
    """

    tau: float
    """Threshold on the spread; larger is coarser and faster. It belongs to the model's latents and
    to ``hold``: find it with ``calibrate_tau``."""
    rho: float = 0.4
    """Quantile over blocks. A mean would hide a small textured region behind a flat background."""
    order: int = 3
    """Order of the difference, 1 to 3; ``order + 1`` latents are needed."""
    hold: int = 4
    """Steps a size is kept after a switch; 1 keeps nothing, ``order`` or more stops the chatter."""
    normalize: Normalization = "divided"
    """Differences "divided" by sigma do not see the spacing of the steps. "raw" ones do: with a
    shifted schedule they grow towards the end even on a straight path."""
    min_fine_first: int = 3
    """First steps that run at the base patch; at least ``order``."""
    min_fine_last: int = 5
    """Last steps that run at the base patch, whatever ``hold`` says: with uniform steps the
    statistic falls again at the end, where detail is made."""
    sizes: tuple[int, ...] = (1, 2, 4)
    """Sizes in units of the base patch, rising, the first one 1."""
    base_patch: int = 2
    """Edge of the model's own patch in latent pixels."""
    channels: ChannelReduction = "joint"
    """Deviation over all channels of a block together, or the mean of those of each channel."""

    def __post_init__(self) -> None:
        """Raises ConfigError for constants that cannot work."""
        checks = (
            ("tau", self.tau >= 0, "use a threshold of at least 0"),
            ("rho", 0 <= self.rho <= 1, "use a quantile between 0 and 1"),
            ("order", self.order in (1, 2, 3), "use 1, 2 or 3"),
            ("hold", self.hold >= 1, "use at least 1 step (no hold)"),
            ("normalize", self.normalize in ("divided", "raw"), "use divided or raw"),
            ("min_fine_first", self.min_fine_first >= self.order, f"use {self.order} or more"),
            ("min_fine_last", self.min_fine_last >= 0, "use 0 or more steps"),
            ("base_patch", self.base_patch >= 1, "use the model's patch size in latent pixels"),
            ("channels", self.channels in ("joint", "per_channel_mean"), "use one of the two"),
        )
        for key, is_right, remedy in checks:
            if not is_right:
                raise ConfigError(f"patch scheduler: {key} = {getattr(self, key)}: {remedy}")
        if self.sizes[:1] != (1,) or list(self.sizes) != sorted(set(self.sizes)):
            raise ConfigError(
                f"patch scheduler: sizes = {self.sizes}: list them rising and begin with 1"
            )

    def first(self, num_samples: int, device: torch.device | str = "cpu") -> PatchDecision:
        """The decision for step 0: the base patch everywhere, nothing to be held."""
        ones_B = torch.ones(num_samples, dtype=torch.int64, device=device)
        return PatchDecision(ones_B, ones_B * self.hold, self._unknown(ones_B))

    def decide(
        self,
        previous: PatchDecision,
        latents: Sequence[Tensor],
        sigmas: Sequence[float],
        *,
        step: int,
        num_steps: int,
    ) -> PatchDecision:
        """Sizes for ``step`` (from 0), after the steps before it.

        ``latents`` and ``sigmas`` are the path so far, oldest first; the last ``order + 1`` are
        read and the last latent is the input of ``step``. A statistic that is not finite decides
        for the base patch. Raises ConfigError as ``statistic`` does.
        """
        scale_B, held_B = previous.scale_B, previous.held_B
        if len(latents) > self.order:
            statistic_BS = self.statistic(latents, sigmas)
        else:
            statistic_BS = self._unknown(scale_B)
        wanted_B = torch.ones_like(scale_B)
        for index, scale in enumerate(self.sizes[1:]):  # rising: the largest that passes stays
            wanted_B = torch.where(statistic_BS[:, index] < self.tau, scale, wanted_B)
        wanted_B = torch.where(held_B < self.hold, scale_B, wanted_B)
        if step < self.min_fine_first or step >= num_steps - self.min_fine_last:
            wanted_B = torch.ones_like(scale_B)
        held_B = torch.where(wanted_B == scale_B, held_B + 1, 1)
        return PatchDecision(wanted_B, held_B, statistic_BS)

    def statistic(self, latents: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
        """Spread (B, coarse sizes) of the path's bend: the ``rho`` quantile over blocks.

        Blocks are spatial; those of all frames of a video count together. Raises ConfigError when
        a block does not divide the latent, sigmas do not fall, or latents are in half precision.
        """
        bend = path_difference(
            latents[-self.order - 1 :], sigmas[-self.order - 1 :], normalize=self.normalize
        )
        columns = [
            torch.quantile(
                block_deviation(bend, scale * self.base_patch, channels=self.channels),
                self.rho,
                dim=1,
            )
            for scale in self.sizes[1:]
        ]
        return torch.stack(columns, dim=1) if columns else bend.new_empty(bend.shape[0], 0)

    def _unknown(self, scale_B: Tensor) -> Tensor:
        shape = (scale_B.shape[0], len(self.sizes) - 1)
        return torch.full(shape, math.nan, device=scale_B.device)


def path_difference(
    latents: Sequence[Tensor], sigmas: Sequence[float], *, normalize: Normalization = "divided"
) -> Tensor:
    """Difference of order n over n + 1 latents (oldest first), shaped as one latent.

    "raw": the n-th difference by steps. "divided": the n-th divided difference in sigma, times
    ``n! (-1 / REFERENCE_STEPS)**n``, which equals the raw one for 50 uniform steps from 1 to 0 and
    no longer depends on the number or spacing of the steps. Raises ConfigError for latents in half
    precision, whose rounding (4e-3 in bfloat16) is larger than what is measured (about 1e-4), and
    for sigmas that do not fall strictly.
    """
    if latents[0].dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"patch scheduler: latents are {latents[0].dtype}, too coarse for differences of "
            "successive steps: keep the sampler's latents in float32"
        )
    if len(latents) != len(sigmas) or any(
        not after < before for before, after in itertools.pairwise(sigmas)
    ):
        raise ConfigError(
            f"patch scheduler: {len(latents)} latents with sigmas {tuple(sigmas)}: "
            "pass one sigma per latent, falling"
        )
    table = list(latents)
    for level in range(1, len(latents)):
        # Neighbours are subtracted first: they are close, so almost nothing is rounded away.
        table = [after - before for before, after in itertools.pairwise(table)]
        if normalize == "divided":
            uniform = -level / REFERENCE_STEPS
            table = [
                entry * (uniform / (sigmas[start + level] - sigmas[start]))
                for start, entry in enumerate(table)
            ]
    return table[0]


def block_deviation(z: Tensor, edge: int, *, channels: ChannelReduction = "joint") -> Tensor:
    """Standard deviation inside each ``edge`` x ``edge`` block of a latent, (B, blocks).

    Population deviation over channels and pixels together, or per channel and then averaged.
    Frames of a video are cut apart. Raises ConfigError when the blocks do not tile the latent.
    """
    height, width = z.shape[-2:]
    if height % edge or width % edge:
        raise ConfigError(
            f"patch scheduler: a latent of {height} x {width} is not a whole number of "
            f"{edge} x {edge} blocks: pad it or leave this size out of sizes"
        )
    video = z.unsqueeze(2) if z.dim() == 4 else z
    cells = video.unflatten(-1, (-1, edge)).unflatten(-3, (-1, edge))  # B, C, T, h, q, w, q
    blocks = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3).flatten(-2)  # B, K, C, q * q
    if channels == "per_channel_mean":
        return blocks.std(dim=-1, correction=0).mean(dim=-1)
    return blocks.flatten(-2).std(dim=-1, correction=0)


def calibrate_tau(statistic_KB: Tensor, stop_step: int, *, quantile: float = 0.5) -> float:
    """Threshold at which coarse steps end near ``stop_step``, from runs at the base patch only.

    ``statistic_KB`` is the logged statistic (decisions' ``statistic_BS``) of the smallest coarse
    size, per step and sample, of a few runs that never left the base patch. ``quantile`` is the
    share of samples that are still coarse at ``stop_step``. The statistic should rise up to there:
    with uniform steps it falls again late, which ``min_fine_last`` has to cover. Raises ConfigError
    for a step outside the log or one without statistic.
    """
    if not 0 <= stop_step < statistic_KB.shape[0]:
        raise ConfigError(
            f"stop_step = {stop_step} is outside the {statistic_KB.shape[0]} logged steps"
        )
    at_stop_B = statistic_KB[stop_step]
    if not bool(at_stop_B.isfinite().all()):
        raise ConfigError(
            f"stop_step = {stop_step} has no statistic yet: choose a later step of the log"
        )
    return float(torch.quantile(at_stop_B, quantile))


def token_fraction(scale_KB: Tensor) -> float:
    """Tokens used over those of a run at the base patch only: the mean of ``1 / scale**2``."""
    return float((1 / scale_KB.double().square()).mean())
