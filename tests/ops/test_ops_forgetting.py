"""Softmax attention that forgets, against the definition: value and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops import blocked_attention
from trinity.ops.attention import causal_attention, forgetting_attention

NAMES = ("q", "k", "v", "log_decay")


def _inputs(num_keys: int, num_queries: int, queries_per_key: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    decay = -torch.rand(2, 3, num_keys, generator=generator, dtype=torch.float64)
    return [
        normal(2, 3 * queries_per_key, num_queries, 8),
        normal(2, 3, num_keys, 8),
        normal(2, 3, num_keys, 8),
        decay.requires_grad_(),
    ]


def _run(inputs: list[Tensor], backend: str, ids: Tensor | None) -> list[Tensor]:
    out = forgetting_attention(*inputs, document_ids_BS=ids, backend=backend)
    grad = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "formed again"])
@pytest.mark.parametrize("queries_per_key", [1, 4])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(
    ("num_keys", "num_queries"), [(1, 1), (63, 63), (100, 100), (257, 257), (300, 77)]
)
def test_blocked_equals_the_definition(
    num_keys: int,
    num_queries: int,
    documents: bool,
    queries_per_key: int,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not keep:
        monkeypatch.setattr(blocked_attention, "MAX_SAVED_BYTES", 0)
    inputs = _inputs(num_keys, num_queries, queries_per_key)
    ids = None
    if documents:
        ids = (torch.rand(2, num_keys, generator=torch.Generator().manual_seed(3)) < 0.05).cumsum(1)
    expected = _run(inputs, "reference", ids)
    for name, got, want in zip(
        ("out", *NAMES), _run(inputs, "blocked", ids), expected, strict=True
    ):
        limit = 1e-12 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def test_without_decay_it_is_attention() -> None:
    q, k, v, decay = _inputs(100, 100)
    out = forgetting_attention(q, k, v, torch.zeros_like(decay), document_ids_BS=None)
    torch.testing.assert_close(out, causal_attention(q, k, v, window=None, document_ids_BS=None))


def test_far_tokens_keep_their_digits_in_fp32() -> None:
    """Sums over 4000 tokens are in the thousands; differences of neighbours must not suffer."""
    inputs = [x.detach() for x in _inputs(4000, 4000)]
    inputs[3] = inputs[3] * 2
    exact = forgetting_attention(*inputs, document_ids_BS=None, backend="blocked")
    narrow = forgetting_attention(
        *(x.float() for x in inputs), document_ids_BS=None, backend="blocked"
    )
    assert float((narrow - exact).abs().max()) < 2e-5


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="'magic' of forgetting attention does not exist"):
        forgetting_attention(*_inputs(5, 5), document_ids_BS=None, backend="magic")
