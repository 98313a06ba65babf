"""Draws: no two alike, none dependent on who draws it, each of its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from trinity.core.draws import Stream, normal_by_row, uniform_by_row


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[4], [1, 5, 3], [0, 2]]])
def test_rows_draw_alone_what_they_draw_together(parts: list[list[int]]) -> None:
    noise = torch.empty(6, 3, 5)
    fraction = torch.empty(6, dtype=torch.float64)
    for part in parts:
        noise[part] = normal_by_row(7, 11, part, (3, 5), Stream.NOISE)
        fraction[part] = uniform_by_row(7, 11, part, Stream.CONDITION)
    assert torch.equal(noise, normal_by_row(7, 11, range(6), (3, 5), Stream.NOISE))
    assert torch.equal(fraction, uniform_by_row(7, 11, range(6), Stream.CONDITION))


def test_seed_step_row_and_stream_each_give_other_numbers() -> None:
    keys = [(seed, step, row) for seed in (0, 1, 2**32) for step in (0, 1) for row in (0, 1)]
    drawn = torch.cat(
        [
            normal_by_row(seed, step, [row], (8,), stream)
            for seed, step, row in keys
            for stream in Stream
        ]
    )
    assert len(drawn.flatten().unique()) == len(keys) * len(Stream) * 8


def test_draws_have_their_distribution() -> None:
    fraction = uniform_by_row(3, 0, range(4000), Stream.SIGMA)
    assert float(fraction.min()) > 0
    assert float(fraction.max()) <= 1
    ranks = torch.arange(1, 4001) / 4000
    assert float((fraction.sort().values - ranks).abs().max()) < 1.63 / math.sqrt(4000)  # 1 %
    noise = normal_by_row(3, 0, [0, 1], (40_000,), Stream.NOISE).double()
    assert_close(noise.mean(1), torch.zeros(2, dtype=torch.float64), atol=0.02, rtol=0)
    assert_close(noise.cov(), torch.eye(2, dtype=torch.float64), atol=0.03, rtol=0)
