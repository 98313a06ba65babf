"""Random numbers that depend on what they are for, and never on who draws them.

A draw is a pure function of (seed, stream, step, row): processes that share out the rows of a step,
or that resume, in another number, in the middle of a run, get the same numbers without keeping the
state of a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. Draws of different streams are independent at the same step and row."""

    SIGMA = 0
    NOISE = 1
    """eps of training, and the latents a sampler starts from."""
    SOLVER = 2
    """Noise that a stochastic solver adds."""
    CONDITION = 3
    """Which rows lose their condition, for classifier-free guidance."""
    CROP = 4
    """Where a picture is cut; its step is the picture, its row the crop."""
    SCALE = 5
    """Patch scale of a training image; its step is the lane, its row the image of the lane."""
    FLIP = 6
    """Which training images are mirrored; numbered as SCALE."""


def generator_for(seed: int, step: int, row: int, stream: Stream) -> np.random.Generator:
    """The generator of one row's draws; see :func:`uniform_by_row`."""
    # Counter-based, so that streams cannot overlap: the low two words of the counter are left to
    # the numbers of one draw. torch's CPU generator would use 32 bits of a seed only.
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform_by_row(seed: int, step: int, rows: Sequence[int], stream: Stream) -> Tensor:
    """Uniform numbers in (0, 1], one per row, (len(rows),) fp64 on the CPU.

    ``rows`` are the rows' numbers in the global batch of ``step``: whoever draws for a row, alone
    or with others, gets the same number.
    """
    draws = [1.0 - generator_for(seed, step, row, stream).random() for row in rows]
    return torch.tensor(draws, dtype=torch.float64)


def normal_by_row(
    seed: int, step: int, rows: Sequence[int], shape: Sequence[int], stream: Stream
) -> Tensor:
    """Standard normal numbers, (len(rows), *shape) fp32 on the CPU; see :func:`uniform_by_row`.

    Drawn on the CPU whatever the device, about 10 ns per number, for the same values everywhere.
    """
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for place, row in enumerate(rows):
        draws = generator_for(seed, step, row, stream)
        noise[place] = draws.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise)
