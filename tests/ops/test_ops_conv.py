"""The short convolution against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trinity.ops.conv import causal_conv


def _by_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, before: Tensor
) -> Tensor:
    """One row: each tap by itself, where it is of the same document."""
    width = weight.shape[1]
    past = torch.cat((before, x))
    document = torch.cat((ids.new_full((width - 1,), int(ids[0])), ids))
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[0]) if bias is None else bias
        for tap in range(width):
            at = t + tap
            if torch.equal(document[at : t + width], document[at].expand(width - tap)):
                y = y + weight[:, tap] * past[at]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_equals_a_loop(width: int, length: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, before = normal(2, length, 6), normal(6, width), normal(2, width - 1, 6)
    bias = normal(6) if has_bias else None
    ids = (torch.rand(2, length, generator=generator) < 0.3).cumsum(1)
    y = causal_conv(x, weight, bias, document_ids_BS=ids, before_BwC=before)
    expected = torch.stack([_by_token(x[i], weight, bias, ids[i], before[i]) for i in range(2)])
    torch.testing.assert_close(y, expected)
    leaves = [t for t in (x, weight, bias, before) if t is not None and t.numel()]
    for actual, wanted in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_equals_torch_without_documents() -> None:
    x, weight, bias = torch.randn(2, 50, 8), torch.randn(8, 4), torch.randn(8)
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.mT, (3, 0)), weight[:, None], bias, groups=8
    ).mT
    torch.testing.assert_close(causal_conv(x, weight, bias), expected)
