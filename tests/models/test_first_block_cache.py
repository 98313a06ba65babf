"""The first block cache: which rows it spares the other blocks, and what they are given instead."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models.dit_cases import fp64_model
from trinity.core.errors import ConfigError
from trinity.models.first_block_cache import FirstBlockCache, Reuse

NUM_TOKENS, WIDTH = 5, 3


class _Others:
    """Blocks that double, and remember for which rows they were run."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_NSD: Tensor, rows_N: Tensor) -> Tensor:
        self.rows = rows_N.tolist()
        return 2 * x_NSD


def _stream(*values: float) -> Tensor:
    return torch.stack([torch.full((NUM_TOKENS, WIDTH), value) for value in values]).double()


def _call(reuse: Reuse, before: Tensor, added: Tensor) -> tuple[Tensor, list[int]]:
    others = _Others()
    return reuse(before, before + added, others), others.rows


def test_a_row_is_spared_while_its_first_block_adds_nearly_the_same() -> None:
    cache = FirstBlockCache(0.1)
    out, ran = _call(cache.at(1, [7, 8]), _stream(1, 2), _stream(1, 1))
    assert ran == [0, 1]
    torch.testing.assert_close(out, _stream(4, 6))
    # Row 8 changes by 9 %, row 7 by 11 %: what the others added to row 8 was 3.
    out, ran = _call(cache.at(1, [8, 7]), _stream(10, 20), _stream(1.09, 0.89))
    assert ran == [1]
    torch.testing.assert_close(out, _stream(10 + 1.09 + 3, 2 * 20.89))
    # Changes are told from the last full run, so that they cannot add up unseen.
    _, ran = _call(cache.at(1, [8]), _stream(10), _stream(1.15))
    assert ran == [0]
    assert (cache.num_calls, cache.num_computed) == (5, 4)


def test_nothing_is_reused_at_another_patch_size_nor_after_one() -> None:
    cache = FirstBlockCache(0.5)
    _call(cache.at(1, [0]), _stream(1), _stream(1))
    for scale in (2, 1):
        _, ran = _call(cache.at(scale, [0]), _stream(1), _stream(1))
        assert ran == [0], scale
    _, ran = _call(cache.at(1, [0]), _stream(1), _stream(1))
    assert ran == []


def test_a_first_block_that_added_nothing_tells_nothing() -> None:
    cache = FirstBlockCache(0.5)
    for _ in range(2):
        _, ran = _call(cache.at(1, [0]), _stream(1), _stream(0))
        assert ran == [0]


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan])
def test_thresholds_that_cannot_be(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        FirstBlockCache(threshold)


def _images(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 2, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_model_that_reuses_everything_is_the_model(scale: int) -> None:
    model, cache, classes = fp64_model().eval(), FirstBlockCache(1e-6), torch.tensor([0, 2, 3])
    z, sigma = _images(3, 0), torch.tensor([0.9, 0.5, 0.2])
    whole = model(z, sigma, classes, scale=scale)
    for repeat in range(2):
        out = model(z, sigma, classes, scale=scale, reuse=cache.at(scale, range(3)))
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
        assert cache.num_computed == 3, repeat


def test_rows_that_are_due_are_computed_with_their_own_conditions() -> None:
    model, cache, classes = fp64_model().eval(), FirstBlockCache(1e-6), torch.tensor([0, 2, 3])
    z, sigma = _images(3, 0), torch.tensor([0.9, 0.5, 0.2])
    model(z, sigma, classes, reuse=cache.at(1, range(3)))
    z[1:] = _images(2, 1)
    classes[1], sigma[2] = 1, 0.7
    out = model(z, sigma, classes, reuse=cache.at(1, range(3)))
    assert cache.num_computed == 5
    torch.testing.assert_close(out, model(z, sigma, classes), rtol=1e-12, atol=1e-12)


def test_a_stale_rest_is_what_the_other_blocks_added_then() -> None:
    """By the definition: the stream after the first block, and the old difference behind it."""
    model, cache, classes = fp64_model().eval(), FirstBlockCache(1e9), torch.tensor([1])
    first, second = _images(1, 0), _images(1, 1)
    streams: list[tuple[Tensor, Tensor]] = []
    layers = list(model.backbone.layers.values())
    after_first: list[Tensor] = []
    after_last: list[Tensor] = []
    hooks = [
        layers[0].register_forward_hook(lambda _m, _i, out: after_first.append(out[0])),
        layers[-1].register_forward_hook(lambda _m, _i, out: after_last.append(out[0])),
    ]
    model(first, 0.8, classes)
    model(second, 0.3, classes)
    for hook in hooks:
        hook.remove()
    expected = after_first[1] + (after_last[0] - after_first[0])
    reuse = cache.at(1, [0])
    model(first, 0.8, classes, reuse=reuse)

    def spy(x: Tensor, after: Tensor, others: object) -> Tensor:
        out = reuse(x, after, others)  # type: ignore[arg-type]
        streams.append((after, out))
        return out

    model(second, 0.3, classes, reuse=spy)
    torch.testing.assert_close(streams[0][1], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, after_last[1], rtol=1e-3)
