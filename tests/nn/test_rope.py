"""Rotary tables: of positions in a row, and of coordinates in an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trinity.models.patching import patch_centres
from trinity.nn.rope import image_rope_tables, rope_tables
from trinity.ops.elementwise import rotary

THETA = 100.0


def test_tables_of_a_row_are_what_checkpoints_were_trained_with() -> None:
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 20, 2, dtype=torch.float32) / 20)
    angles = torch.outer(torch.arange(3, 40, dtype=torch.float32), frequencies).repeat(1, 2)
    cos, sin = rope_tables(37, 20, 1e4, "cpu", start=3)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_one_axis_of_whole_numbers_is_a_row() -> None:
    positions_BSA = torch.arange(11, dtype=torch.float32).view(1, 11, 1)
    for image, row in zip(
        image_rope_tables(positions_BSA, 14, THETA), rope_tables(11, 14, THETA, "cpu"), strict=True
    ):
        assert torch.equal(image[0], row)


@pytest.mark.parametrize(
    ("num_axes", "pairs"), [(2, [5, 4]), (3, [3, 3, 3]), (3, [4, 3, 3]), (3, [5, 3, 3])]
)
def test_channel_pairs_are_divided_among_the_axes(num_axes: int, pairs: list[int]) -> None:
    head_dim = 2 * sum(pairs)
    for axis in range(num_axes):
        coordinates_BSA = torch.zeros(1, 1, num_axes)
        coordinates_BSA[..., axis] = 0.5
        cos, sin = (table[0, 0] for table in image_rope_tables(coordinates_BSA, head_dim, THETA))
        own = slice(sum(pairs[:axis]), sum(pairs[: axis + 1]))
        angles = torch.zeros(sum(pairs))
        angles[own] = 0.5 * THETA ** -(torch.arange(pairs[axis]) / pairs[axis])
        torch.testing.assert_close(cos, angles.cos().repeat(2))
        torch.testing.assert_close(sin, angles.sin().repeat(2))


def _scores(coordinates_BSA: Tensor, q_Sd: Tensor, k_Sd: Tensor) -> Tensor:
    tables = image_rope_tables(coordinates_BSA, q_Sd.shape[-1], THETA)
    q_BHSd, k_BHSd = (rotary(x_Sd[None, None], *tables) for x_Sd in (q_Sd, k_Sd))
    return (q_BHSd @ k_BHSd.mT)[0, 0]


@pytest.mark.parametrize("grid", [(4, 5), (2, 3, 4)])
@pytest.mark.parametrize("scale", [1, 2])
def test_scores_depend_on_the_difference_of_coordinates_only(
    grid: tuple[int, ...], scale: int
) -> None:
    coordinates_BSA = patch_centres(grid, scale)[None]
    generator = torch.Generator().manual_seed(0)
    q_Sd, k_Sd = torch.randn(2, coordinates_BSA.shape[1], 16, generator=generator).double()
    here = _scores(coordinates_BSA, q_Sd, k_Sd)
    moved = _scores(coordinates_BSA + torch.tensor([7.0, 2.5, -3.75][-len(grid) :]), q_Sd, k_Sd)
    torch.testing.assert_close(here, moved, rtol=1e-5, atol=1e-5)
    same_q_k = _scores(coordinates_BSA, q_Sd[:1].expand_as(q_Sd), k_Sd[:1].expand_as(k_Sd))
    difference = coordinates_BSA[0, :, None] - coordinates_BSA[0, None]
    for axis in range(len(grid)):  # each axis counts: pairs that differ in it alone
        alone = (difference[..., axis] == scale) & (difference.abs().sum(-1) == scale)
        if len(grid) == 3 and axis == 0:
            alone = (difference[..., 0] == 1) & (difference.abs().sum(-1) == 1)
        assert alone.any()
        values = same_q_k[alone]
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-5)
        assert not torch.isclose(values[0], same_q_k[0, 0], rtol=1e-3)


def test_a_coarse_patch_stands_at_the_mean_of_the_base_tokens_under_it() -> None:
    base = patch_centres((6, 6), 1).view(3, 2, 3, 2, 2)
    mean_BSA = base.mean(dim=(1, 3)).view(1, 9, 2)
    coarse = image_rope_tables(patch_centres((3, 3), 2)[None], 12, THETA)
    for a, b in zip(coarse, image_rope_tables(mean_BSA, 12, THETA), strict=True):
        assert torch.equal(a, b)
