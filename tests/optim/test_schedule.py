"""Schedules against hand-computed tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from trinity.optim.clip import clip_gradients, square_sum
from trinity.optim.schedule import lr_factor, rows_at_step, rows_before_step

BASE: dict[str, Any] = {
    "warmup_steps": 4,
    "num_steps": 12,
    "decay_steps": 4,
    "final_fraction": 0.2,
    "decay_shape": "linear",
}
WARMUP = [0.25, 0.5, 0.75, 1.0]
TABLES = {
    "constant": [*WARMUP, *[1.0] * 8],
    "linear": [*WARMUP, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    "wsd": [*WARMUP, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
    "cosine": [
        *WARMUP, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448, 0.2
    ],
}  # fmt: skip


@pytest.mark.parametrize("shape", TABLES)
def test_factor_follows_the_table(shape: str) -> None:
    factors = [lr_factor(step, shape=shape, **BASE) for step in range(12)]
    assert factors == pytest.approx(TABLES[shape], abs=1e-6)


def test_wsd_may_decay_along_a_cosine() -> None:
    options = BASE | {"decay_shape": "cosine"}
    factors = [lr_factor(step, shape="wsd", **options) for step in range(8, 12)]
    assert factors == pytest.approx([0.882843, 0.6, 0.317157, 0.2], abs=1e-6)


def test_no_warmup_and_no_decay() -> None:
    options = BASE | {"warmup_steps": 0, "decay_steps": 0}
    assert [lr_factor(s, shape="wsd", **options) for s in (0, 11)] == [1.0, 1.0]


class Point(NamedTuple):
    from_step: int
    rows_per_step: int


def test_batch_ramp_counts_every_row_once() -> None:
    ramp = [Point(3, 8), Point(5, 16)]
    rows = [rows_at_step(step, 4, ramp) for step in range(8)]
    assert rows == [4, 4, 4, 8, 8, 16, 16, 16]
    assert [rows_before_step(step, 4, ramp) for step in range(8)] == [
        sum(rows[:step]) for step in range(8)
    ]
    assert rows_before_step(7, 4, []) == 28


@pytest.mark.parametrize("max_norm", [0.5, 100.0, float("inf")])
def test_clipping_scales_all_gradients_together(max_norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(7))]
    unused = torch.nn.Parameter(torch.randn(2))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten().clone() for p in parameters])  # type: ignore[union-attr]
    norm = square_sum([*parameters, unused]).sqrt()
    clip_gradients([*parameters, unused], norm, max_norm)
    after = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    factor = min(1.0, max_norm / float(norm))
    torch.testing.assert_close(after, before * factor, rtol=1e-5, atol=0)
