"""Every attention backend against the definition: value and the gradients of q, k and v."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trinity.core.errors import ConfigError
from trinity.ops import blocked_attention
from trinity.ops.attention import BACKENDS, attention_reference, causal_attention, document_starts

B, d = 2, 8


def _qkv(num_tokens, groups=2, dtype=torch.float64, layout="bhsd", seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(heads):
        x = torch.randn(B, num_tokens, heads, d, generator=gen, dtype=torch.float64).to(dtype)
        x = x.transpose(1, 2)
        return (x.contiguous() if layout == "bhsd" else x).requires_grad_()

    return draw(2 * groups), draw(2), draw(2)


def _documents(num_tokens, seed=0):
    """Boundaries at odd places, different in each row; ids come back, which means nothing."""
    gen = torch.Generator().manual_seed(seed)
    begins = torch.rand(B, num_tokens, generator=gen) < 0.06
    begins[0, num_tokens // 2] = True
    return begins.cumsum(1).remainder(3).to(torch.int32)


def _run(qkv, grad, **kwargs):
    out = causal_attention(*qkv, **kwargs)
    return out, *torch.autograd.grad(out, qkv, grad)


def _reference(qkv, grad, **kwargs):
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = attention_reference(*exact, **kwargs)
    return out, *torch.autograd.grad(out, exact, grad.double())


def _assert_close(got, want, *, relative):
    for a, b in zip(got, want, strict=True):
        limit = relative * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=limit)


@pytest.mark.parametrize("num_tokens", [1, 63, 100, 257])
@pytest.mark.parametrize("window", [None, 1, 5, 33, 100, 1000])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_blocked_equals_the_definition(num_tokens, window, with_documents, layout):
    qkv = _qkv(num_tokens, layout=layout)
    ids = _documents(num_tokens) if with_documents else None
    grad = torch.randn_like(qkv[0])
    settings = {"window": window, "document_ids_BS": ids}
    got = _run(qkv, grad, backend="blocked", **settings)
    _assert_close(got, _reference(qkv, grad, **settings), relative=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("window", "with_documents"), itertools.product([None, 24], [False, True]))
def test_grouped_queries(groups, window, with_documents):
    qkv = _qkv(100, groups)
    settings = {"window": window, "document_ids_BS": _documents(100) if with_documents else None}
    grad = torch.randn_like(qkv[0])
    got = _run(qkv, grad, backend="blocked", **settings)
    _assert_close(got, _reference(qkv, grad, **settings), relative=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_sdpa_equals_the_definition(num_tokens, groups, with_documents, layout):
    qkv = _qkv(num_tokens, groups, layout=layout)
    ids = _documents(num_tokens) if with_documents else None
    grad = torch.randn_like(qkv[0])
    got = _run(qkv, grad, backend="sdpa", window=None, document_ids_BS=ids)
    want = _reference(qkv, grad, window=None, document_ids_BS=ids)
    _assert_close(got, want, relative=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", ["auto", "reference", "blocked"])
def test_low_precision(dtype, window, backend):
    qkv = _qkv(150, dtype=dtype)
    grad = torch.randn_like(qkv[0])
    settings = {"window": window, "document_ids_BS": _documents(150)}
    got = _run(qkv, grad, backend=backend, **settings)
    assert {x.dtype for x in got} == {dtype}
    relative = 1e-5 if dtype == torch.float32 else 0.03
    _assert_close(got, _reference(qkv, grad, **settings), relative=relative)


def test_reference_is_torchs_attention():
    q, k, v = _qkv(50, groups=2)
    got = attention_reference(q, k, v, window=None, document_ids_BS=None)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_window_counts_the_token_itself(backend):
    """Values are one-hot positions, so the output shows exactly which keys were seen."""
    num_tokens, window = 40, 5
    v = torch.eye(num_tokens, dtype=torch.float64)[None, None]
    q = torch.zeros(1, 1, num_tokens, num_tokens, dtype=torch.float64)
    out = causal_attention(q, q, v, window=window, document_ids_BS=None, backend=backend)[0, 0]
    for i in range(num_tokens):
        seen = (out[i] > 0).nonzero().flatten().tolist()
        assert seen == list(range(max(0, i - window + 1), i + 1))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_documents_equal_separate_calls(window, backend):
    num_tokens, cuts = 150, [0, 1, 37, 64, 101, 150]
    q, k, v = _qkv(num_tokens)
    ids = torch.zeros(B, num_tokens, dtype=torch.int32)
    for cut in cuts[1:-1]:
        ids[:, cut:] += 1
    packed = causal_attention(q, k, v, window=window, document_ids_BS=ids, backend=backend)
    for a, b in itertools.pairwise(cuts):
        piece = (x[:, :, a:b] for x in (q, k, v))
        alone = causal_attention(*piece, window=window, document_ids_BS=None, backend=backend)
        torch.testing.assert_close(packed[:, :, a:b], alone)


def test_document_starts():
    ids = torch.tensor([[0, 0, 1, 1, 0], [5, 6, 6, 6, 7]])
    assert document_starts(ids).tolist() == [[0, 0, 2, 2, 4], [0, 1, 1, 1, 4]]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("limit_bytes", [0, 500_000])
def test_probabilities_formed_again_in_the_backward_are_the_same(monkeypatch, window, limit_bytes):
    qkv = _qkv(257)
    grad = torch.randn_like(qkv[0])
    settings = {"window": window, "document_ids_BS": _documents(257), "backend": "blocked"}
    kept = _run(qkv, grad, **settings)
    monkeypatch.setattr(blocked_attention, "MAX_SAVED_BYTES", limit_bytes)
    again = _run(qkv, grad, **settings)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("window", [None, 24])
def test_recomputation_changes_nothing(reentrant, window):
    q, k, v = qkv = _qkv(100)
    ids = _documents(100)
    want = _run(qkv, torch.ones_like(q), window=window, document_ids_BS=ids, backend="blocked")

    def attend(q, k, v):
        return causal_attention(q, k, v, window=window, document_ids_BS=ids, backend="blocked")

    out = checkpoint(attend, q, k, v, use_reentrant=reentrant)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    for a, b in zip((out, q.grad, k.grad, v.grad), want, strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    qkv = [x[:, :, :, :3].detach().requires_grad_() for x in _qkv(21)]
    ids = _documents(21)

    def attend(q, k, v):
        return causal_attention(q, k, v, window=6, document_ids_BS=ids, backend="blocked")

    assert torch.autograd.gradcheck(attend, qkv, fast_mode=True)


def test_two_runs_are_bit_equal():
    qkv = _qkv(100, dtype=torch.bfloat16)
    settings = {"window": 30, "document_ids_BS": _documents(100)}
    first = _run(qkv, torch.ones_like(qkv[0]), **settings)
    second = _run(qkv, torch.ones_like(qkv[0]), **settings)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [None, 20])
def test_autocast_computes_in_bf16(window):
    qkv = _qkv(70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = causal_attention(*qkv, window=window, document_ids_BS=None)
        grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.dtype == torch.bfloat16
    assert {g.dtype for g in grads} == {torch.float32}
    low = [x.detach().bfloat16() for x in qkv]
    assert torch.equal(out, causal_attention(*low, window=window, document_ids_BS=None))


def test_bad_requests_are_refused_by_name():
    qkv = _qkv(10)
    with pytest.raises(ConfigError, match="blocked, sdpa, reference"):
        causal_attention(*qkv, window=None, document_ids_BS=None, backend="flash")
    with pytest.raises(ConfigError, match="no sliding window"):
        causal_attention(*qkv, window=3, document_ids_BS=None, backend="sdpa")
    with pytest.raises(ConfigError, match="window 0"):
        causal_attention(*qkv, window=0, document_ids_BS=None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_row_is_plain_causal(backend):
    qkv = _qkv(30)
    plain = causal_attention(*qkv, window=None, document_ids_BS=None, backend=backend)
    wide = causal_attention(*qkv, window=30, document_ids_BS=None, backend=backend)
    assert torch.equal(plain, wide)


@pytest.mark.parametrize("num_queries", [1, 37, 128])
@pytest.mark.parametrize("window", [None, 1, 5, 33, 100, 1000])
@pytest.mark.parametrize("with_documents", [False, True])
def test_queries_that_end_a_longer_row_see_what_they_see_in_the_whole_row(
    num_queries, window, with_documents
):
    q, k, v = _qkv(257)
    documents = _documents(257) if with_documents else None
    options = {"window": window, "document_ids_BS": documents}
    whole = attention_reference(q, k, v, **options)[:, :, -num_queries:]
    grad = torch.randn_like(whole)
    want = torch.autograd.grad(whole, (q, k, v), grad)
    for backend in ("blocked", "reference"):
        part = causal_attention(q[:, :, -num_queries:], k, v, backend=backend, **options)
        got = torch.autograd.grad(part, (q, k, v), grad)
        _assert_close((part, *got), (whole, *want), relative=1e-12)
