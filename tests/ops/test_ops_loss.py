"""The chunked vocabulary loss against all logits at once: sums, gradients, ignored rows, dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trinity.ops.loss import linear_cross_entropy, linear_cross_entropy_reference

D, V = 16, 53


def _inputs(num_tokens, dtype=torch.float64, weight_dtype=None, ignored=0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, D, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=gen, dtype=torch.float64).to(weight_dtype or dtype)
    target = torch.randint(V, (num_tokens,), generator=gen)
    target[torch.randperm(num_tokens, generator=gen)[:ignored]] = -100
    return x.requires_grad_(), weight.requires_grad_(), target


def _run(function, x, weight, target, upstream=1.0, **kwargs):
    loss = function(x, weight, target, **kwargs)
    return loss, torch.autograd.grad(loss.total * upstream, (x, weight))


@pytest.mark.parametrize("num_tokens", [1, 63, 100, 257])
@pytest.mark.parametrize("chunk_rows", [1, 64, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("ignored", [0, 0.3])
def test_sums_and_gradients_equal_the_reference(num_tokens, chunk_rows, z_loss, ignored):
    x, weight, target = _inputs(num_tokens, ignored=int(ignored * num_tokens))
    fast, fast_grads = _run(
        linear_cross_entropy, x, weight, target, 0.37, z_loss=z_loss, chunk_rows=chunk_rows
    )
    slow, slow_grads = _run(linear_cross_entropy_reference, x, weight, target, 0.37, z_loss=z_loss)
    for a, b in zip((*fast, *fast_grads), (*slow, *slow_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_cross_entropy_is_torchs_sum():
    x, weight, target = _inputs(40, ignored=5)
    loss = linear_cross_entropy(x, weight, target, z_loss=0.5, chunk_rows=16)
    want = F.cross_entropy(x @ weight.T, target, reduction="sum")
    torch.testing.assert_close(loss.cross_entropy, want)
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.5 * loss.z)


def test_gradcheck():
    x, weight, target = _inputs(7, ignored=2)

    def total(x, weight):
        return linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=3).total

    assert torch.autograd.gradcheck(total, (x, weight))


def test_nothing_valid_is_exactly_zero():
    x, weight, target = _inputs(9, ignored=9)
    loss, grads = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=4)
    assert [t.item() for t in loss] == [0.0, 0.0, 0.0]
    assert not any(g.any() for g in grads)


def test_ignored_rows_may_hold_anything():
    x, weight, target = _inputs(20, ignored=3)
    want = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=8)
    with torch.no_grad():
        x[target == -100] = float("nan")
    got = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=8)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_another_ignore_index():
    x, weight, target = _inputs(20)
    target[3] = 7
    target[target == 7] = 0
    target[3] = 7
    loss = linear_cross_entropy(x, weight, target, z_loss=0.0, chunk_rows=8, ignore_index=7)
    keep = torch.arange(20) != 3
    want = linear_cross_entropy_reference(x[keep], weight, target[keep], z_loss=0.0)
    torch.testing.assert_close(loss.total, want.total)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_fp32_stays_exact_when_the_target_is_hopeless(scale):
    """Probabilities underflow long before log-probabilities do."""
    x, weight, target = _inputs(50, dtype=torch.float32)
    x = (x.detach() * scale).requires_grad_()
    fast, grads = _run(linear_cross_entropy, x, weight, target, z_loss=1e-4, chunk_rows=16)
    exact = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    slow, slow_grads = _run(linear_cross_entropy_reference, *exact, target, z_loss=1e-4)
    torch.testing.assert_close(fast.total.double(), slow.total, rtol=1e-5, atol=0)
    for a, b in zip(grads, slow_grads, strict=True):
        limit = 1e-5 * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=limit * max(1.0, scale / 30))


def test_bf16_hidden_states_over_an_fp32_head():
    x, weight, target = _inputs(100, dtype=torch.bfloat16, weight_dtype=torch.float32, ignored=10)
    loss, grads = _run(linear_cross_entropy, x, weight, target, z_loss=1e-3, chunk_rows=32)
    assert loss.total.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    exact = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    slow, slow_grads = _run(linear_cross_entropy_reference, *exact, target, z_loss=1e-3)
    torch.testing.assert_close(loss.total.double(), slow.total, rtol=3e-3, atol=0)
    for a, b in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


def test_autocast_computes_in_bf16():
    x, weight, target = _inputs(30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = _run(linear_cross_entropy, x, weight, target, z_loss=0.0, chunk_rows=8)
    low = _run(linear_cross_entropy, x.bfloat16(), weight, target, z_loss=0.0, chunk_rows=8)
    assert torch.equal(loss.total, low[0].total)
    assert torch.equal(grads[1], low[1][1])
    assert grads[0].dtype == torch.float32


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    x, weight, target = _inputs(20)
    want = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=8)[1]
    if frozen == "x":
        x = x.detach()
    else:
        weight = weight.detach()
    linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=8).total.backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")
    live = x.grad if frozen == "weight" else weight.grad
    assert live is not None
    torch.testing.assert_close(live, want[0] if frozen == "weight" else want[1])


def test_without_gradients_none_is_formed(monkeypatch):
    from trinity.ops import loss as module

    x, weight, target = _inputs(20)
    want = linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=8)
    monkeypatch.setattr(module._ChunkWalk, "gradient", None)
    with torch.no_grad():
        got = linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=8)
    frozen = linear_cross_entropy(x.detach(), weight.detach(), target, z_loss=0.1, chunk_rows=8)
    for result in (got, frozen):
        assert not result.total.requires_grad
        torch.testing.assert_close(result.total, want.total.detach(), rtol=0, atol=0)


def test_only_the_total_carries_a_gradient():
    x, weight, target = _inputs(5)
    loss = linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=8)
    assert (loss.total.requires_grad, loss.cross_entropy.requires_grad) == (True, False)
    assert not loss.z.requires_grad


def test_a_second_backward_over_a_kept_graph_gives_the_same():
    x, weight, target = _inputs(20)
    total = linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=8).total
    first = torch.autograd.grad(total * 3, (x, weight), retain_graph=True)
    second = torch.autograd.grad(total * 3, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_nothing(reentrant):
    x, weight, target = _inputs(40, ignored=4)
    want = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=16)

    def total(x, weight):
        return linear_cross_entropy(x, weight, target, z_loss=0.1, chunk_rows=16).total

    result = checkpoint(total, x, weight, use_reentrant=reentrant)
    assert isinstance(result, torch.Tensor)
    result.backward()
    assert torch.equal(result, want[0].total)
    assert torch.equal(x.grad, want[1][0])
    assert torch.equal(weight.grad, want[1][1])


def test_non_contiguous_inputs():
    x, weight, target = _inputs(40)
    want = _run(linear_cross_entropy, x, weight, target, z_loss=0.1, chunk_rows=16)
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in (x, weight)]
    spread = target.repeat_interleave(2)[::2]
    got = _run(linear_cross_entropy, *strided, spread, z_loss=0.1, chunk_rows=16)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b)
