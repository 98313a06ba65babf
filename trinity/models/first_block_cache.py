"""Leaves out most of a model in sampling steps that would change little: the first block cache.

A row's first block is always computed. While what it adds to the stream is nearly what it added
when the row last went through all blocks, the other blocks are taken to add what they added then.
(First published with ParaAttention, 2024; diffusers has it for its own models.) Rows decide alone,
so that a sample does not depend on what else is drawn with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.errors import ConfigError

OtherBlocks = Callable[[Tensor, Tensor], Tensor]
"""The stream after the last block, from that after the first one, (N, S, D), and the places in the
batch of these rows, (N,)."""
Reuse = Callable[[Tensor, Tensor, OtherBlocks], Tensor]
"""The stream after the last block, (B, S, D), from that before and after the first block and the
other blocks."""


class _Kept(NamedTuple):
    """What is known of a row since it last went through all blocks."""

    scale: int
    first_SD: Tensor
    """What the first block added."""
    others_SD: Tensor
    """What the others added."""


class FirstBlockCache:
    """The rows of one sampling run. Deciding waits for the device, once per call."""

    def __init__(self, threshold: float) -> None:
        """Raises ConfigError for a threshold that cannot be.

        Args:
            threshold: relative change of what the first block adds, as mean absolute values, below
                which the other blocks are left out; 0 leaves out nothing.
        """
        if not 0 <= threshold < float("inf"):
            raise ConfigError(f"first block cache: threshold = {threshold}: use 0 or more, finite")
        self.threshold = threshold
        self.num_calls = self.num_computed = 0
        """Rows that were asked for, and those among them that went through all blocks."""
        self._kept: dict[int, _Kept] = {}

    def at(self, scale: int, rows: Sequence[int]) -> Reuse:
        """What a model is given for one call: the patch scale, and which rows of the run its batch
        is. A row that ran at another scale meanwhile has nothing to reuse."""
        return functools.partial(self._run, scale, list(rows))

    def _run(
        self,
        scale: int,
        rows: list[int],
        x_BSD: Tensor,
        after_first_BSD: Tensor,
        others: OtherBlocks,
    ) -> Tensor:
        first_BSD = after_first_BSD - x_BSD
        is_due = self._due(scale, rows, first_BSD)
        due = [place for place, flag in enumerate(is_due) if flag]
        spared = [place for place, flag in enumerate(is_due) if not flag]
        self.num_calls += len(rows)
        self.num_computed += len(due)
        out_BSD = torch.empty_like(after_first_BSD)
        if due:
            due_N = torch.tensor(due, device=x_BSD.device)
            after_NSD = after_first_BSD[due_N]
            full_NSD = others(after_NSD, due_N)
            out_BSD[due_N] = full_NSD
            for place, added_SD in zip(due, full_NSD - after_NSD, strict=True):
                # Copies: a view would keep the whole batch alive.
                self._kept[rows[place]] = _Kept(scale, first_BSD[place].clone(), added_SD.clone())
        if spared:
            others_NSD = torch.stack([self._kept[rows[place]].others_SD for place in spared])
            out_BSD[spared] = after_first_BSD[spared] + others_NSD
        return out_BSD

    def _due(self, scale: int, rows: list[int], first_BSD: Tensor) -> list[bool]:
        """Which rows have to go through all blocks."""
        is_due = [True] * len(rows)
        known = {place: self._kept[row] for place, row in enumerate(rows) if row in self._kept}
        known = {place: kept for place, kept in known.items() if kept.scale == scale}
        if not known:
            return is_due
        places = list(known)
        before_NSD = torch.stack([kept.first_SD for kept in known.values()])
        change_N = (first_BSD[places] - before_NSD).abs().mean(dim=(1, 2))
        # Where nothing was added before, nothing can be told: NaN and infinity are no less.
        is_small = change_N / before_NSD.abs().mean(dim=(1, 2)) < self.threshold
        for place, small in zip(places, is_small.tolist(), strict=True):
            is_due[place] = not small
        return is_due
