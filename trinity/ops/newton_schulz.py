"""Approximate orthogonalisation of stacks of matrices by Newton-Schulz iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from trinity.core.errors import ConfigError

Quintic = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Quintic, ...]] = {
    # K. Jordan, "Muon" (2024): one quintic for every iteration.
    "keller": ((3.4445, -4.7750, 2.0315),),
    # Step-dependent quintics of the Muon in Microsoft's Dion library, which Trinity's is based on.
    "trinity": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
NORM_EPS = 1e-7
GRAM_MIN_ASPECT = 1.5
"""From this ratio of long to short side the Gram form costs less."""
GRAM_RESTART = 2
"""Iterations between restarts of the Gram form; longer ones lose accuracy in bf16."""


def quintics(name: str, num_iterations: int) -> list[Quintic]:
    """The coefficients (a, b, c) of each iteration; the last of a set repeats when it runs out.

    Raises ConfigError for an unknown set.
    """
    if name not in COEFFICIENTS:
        raise ConfigError(
            f"optim.muon.coefficients={name!r} is unknown; use one of {', '.join(COEFFICIENTS)}"
        )
    table = COEFFICIENTS[name]
    return [table[min(i, len(table) - 1)] for i in range(num_iterations)]


def orthogonalize(
    g_MN: Tensor,
    *,
    coefficients: str,
    num_iterations: int,
    dtype: torch.dtype,
    gram: bool | None = None,
) -> Tensor:
    """Push the singular values of every matrix (the last two dims) towards 1.

    x <- a x + (b A + c A A) x with A = x x^T, from x = g / ||g||_F, on the transpose of a tall
    matrix. ``gram`` chooses the form that iterates on A instead of x; None takes it where it is
    cheaper. Leading dims are a batch. A zero matrix stays zero. Returns ``dtype``.
    """
    table = quintics(coefficients, num_iterations)
    x = g_MN.reshape(-1, *g_MN.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(x.dtype))
    x = (x / (norm + NORM_EPS)).to(dtype).contiguous()
    if gram is None:
        gram = x.shape[-1] >= GRAM_MIN_ASPECT * x.shape[-2]
    x = _gram_form(x, table) if gram else _standard_form(x, table)
    return (x.mT if is_tall else x).reshape(g_MN.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _standard_form(x: Tensor, table: list[Quintic]) -> Tensor:
    for a, b, c in table:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram_form(x: Tensor, table: list[Quintic]) -> Tensor:
    """The same iteration on A = x x^T: x is touched once per restart only."""
    for start in range(0, len(table), GRAM_RESTART):
        segment = table[start : start + GRAM_RESTART]
        gram = torch.bmm(x, x.mT)
        total: Tensor | None = None
        for i, (a, b, c) in enumerate(segment):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            total = factor if total is None else torch.bmm(factor, total)
            if i + 1 < len(segment):
                gram = torch.bmm(torch.bmm(factor, gram), factor)
        assert total is not None
        x = torch.bmm(total, x)
    return x
