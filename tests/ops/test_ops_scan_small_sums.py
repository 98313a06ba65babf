"""The normalised scan where weights are next to nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from trinity.ops import squared_scan
from trinity.ops.scan import empty_state, scan


@pytest.mark.parametrize("backend", ["chunked", "quadratic", "recurrent"])
@pytest.mark.parametrize("cosine", [1e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("start", ["no state", "empty state", "document"])
def test_a_lone_token_returns_its_value(cosine: float, backend: str, start: str) -> None:
    """Whatever its query is: q orthogonal to k must neither lose v nor blow up gradients."""
    place, num_tokens = (3, 5) if start == "document" else (0, 1)
    q, k, v = torch.randn(3, 1, num_tokens, 2, 64, generator=torch.Generator().manual_seed(0))
    q[:, place] = 0.0
    q[:, place, :, 0], k[:, place, :, 0] = 3.0, 3.0 * cosine
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ids = torch.tensor([[0, 0, 0, 1, 1]]) if start == "document" else None
    empty = empty_state(k, v, power=2, normalize=True) if start == "empty state" else None
    out, _ = scan(
        *leaves,
        torch.zeros(1, num_tokens, 2),
        power=2,
        normalize=True,
        document_ids_BS=ids,
        initial_state=empty,
        return_state=False,
        backend=backend,
    )
    assert torch.equal(out[:, place], leaves[2][:, place])
    grads = torch.autograd.grad(out[:, place].sum(), leaves)
    for grad in grads[:2]:
        assert float(grad.abs().max()) == 0
    assert torch.equal(grads[2][:, place], torch.ones(1, 2, 64))


def test_a_row_whose_sum_is_rounding_has_no_wild_gradient() -> None:
    """Read from a state, the weights of orthogonal keys come to noise of either sign."""
    q, k, v = torch.zeros(3, 1, 65, 1, 64).unbind()
    q[..., 0], k[..., 1] = 3.0, 3.0
    q = q + 1e-5 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    with mock.patch.multiple(squared_scan, CHUNK_TOKENS=16, QUADRATIC_TOKENS={64: 0}):
        out, _ = scan(
            *leaves, v + 1.0, torch.zeros(1, 65, 1), power=2, normalize=True, return_state=False
        )
    assert float(out.detach().abs().max()) <= 1.001
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert float(grad.abs().max()) < 1
