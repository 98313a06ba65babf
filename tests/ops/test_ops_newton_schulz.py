"""Orthogonalisation: every matrix on its own, both forms, every coefficient set."""

from __future__ import annotations

import pytest
import torch

from trinity.core.errors import ConfigError
from trinity.ops.newton_schulz import COEFFICIENTS, orthogonalize, quintics

SHAPES = [(16, 16), (12, 33), (33, 12), (1, 9), (9, 1), (64, 20), (3, 2, 10, 31)]


def _naive(matrix: torch.Tensor, name: str, num_iterations: int) -> torch.Tensor:
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for a, b, c in quintics(name, num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("gram", [False, True, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_naive_loop_over_matrices(
    shape: tuple[int, ...], gram: bool | None, name: str
) -> None:
    stack = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(
        stack, coefficients=name, num_iterations=5, dtype=torch.float64, gram=gram
    )
    flat = stack.reshape(-1, *shape[-2:])
    expected = torch.stack([_naive(matrix, name, 5) for matrix in flat]).reshape(shape)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "low", "high"), [("keller", 0.6, 1.25), ("trinity", 0.85, 1.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gram", [False, True])
def test_singular_values_end_near_one(
    name: str, low: float, high: float, dtype: torch.dtype, gram: bool
) -> None:
    result = orthogonalize(
        torch.randn(4, 32, 96), coefficients=name, num_iterations=5, dtype=dtype, gram=gram
    )
    values = torch.linalg.svdvals(result.float())
    assert low < float(values.min())
    assert float(values.max()) < high


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    matrix = torch.randn(8, 12, dtype=torch.float64)
    options = {"coefficients": "trinity", "num_iterations": 5, "dtype": torch.float64}
    torch.testing.assert_close(
        orthogonalize(matrix * 1e4, **options), orthogonalize(matrix, **options), atol=1e-6, rtol=0
    )
    zeros = torch.zeros(2, 8, 12)
    assert not orthogonalize(zeros, **(options | {"dtype": torch.bfloat16})).any()


def test_unknown_set_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="keller, trinity"):
        quintics("quintic", 5)


def test_a_short_table_repeats_its_last_row() -> None:
    assert quintics("keller", 3) == [COEFFICIENTS["keller"][0]] * 3
    assert quintics("trinity", 7)[5:] == [COEFFICIENTS["trinity"][-1]] * 2
