"""Routed experts against the loop: value, every gradient, awkward loads, dtypes, recomputation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trinity.core.errors import ConfigError
from trinity.ops.grouped_mm import BACKENDS, expert_ffn, expert_ffn_reference

D, F, E, K = 16, 24, 6, 3


def _inputs(num_tokens, routing="random", dtype=torch.float64, parameter_dtype=None, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, kind):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(kind).requires_grad_()

    parameter_dtype = parameter_dtype or dtype
    wide = torch.promote_types(dtype, torch.float32)
    x = normal(num_tokens, D, kind=dtype)
    gate_up = normal(E, 2, F, D, kind=parameter_dtype)
    down = normal(E, D, F, kind=parameter_dtype)
    weight = normal(num_tokens, K, kind=wide)
    index = torch.rand(num_tokens, E, generator=gen).argsort(1)[:, :K]
    if routing == "empty":  # experts 0, 3 and the last get nobody
        index = torch.tensor([1, 2, 4])[index % 3]
    elif routing == "hot":  # everybody, three times over
        index = torch.full_like(index, 2)
    return x, gate_up, down, index, weight


def _run(backend, inputs, grad):
    x, gate_up, down, index, weight = inputs
    leaves = (x, gate_up, down, weight)
    y = expert_ffn(x, gate_up, down, index, weight, backend=backend)
    return y, torch.autograd.grad(y, leaves, grad)


def _reference(inputs, grad):
    x, gate_up, down, index, weight = inputs
    leaves = [t.detach().double().requires_grad_() for t in (x, gate_up, down, weight)]
    y = expert_ffn_reference(leaves[0], leaves[1], leaves[2], index, leaves[3])
    return y, torch.autograd.grad(y, leaves, grad.double())


def _assert_close(got, want, *, relative):
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        scale = b.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=relative * scale)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 100, 257])
@pytest.mark.parametrize("routing", ["random", "empty", "hot"])
def test_fused_equals_the_loop(num_tokens, routing):
    inputs = _inputs(num_tokens, routing)
    grad = torch.randn(num_tokens, D, dtype=torch.float64)
    _assert_close(_run("fused", inputs, grad), _reference(inputs, grad), relative=1e-12)


@pytest.mark.parametrize("num_tokens", [1, 63, 100])
@pytest.mark.parametrize("routing", ["random", "empty", "hot"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_in_fp32(backend, num_tokens, routing):
    inputs = _inputs(num_tokens, routing, dtype=torch.float32)
    grad = torch.randn(num_tokens, D)
    _assert_close(_run(backend, inputs, grad), _reference(inputs, grad), relative=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["random", "empty", "hot"])
def test_every_backend_in_bf16_over_fp32_parameters(backend, routing):
    inputs = _inputs(100, routing, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    grad = torch.randn(100, D, dtype=torch.bfloat16)
    got = _run(backend, inputs, grad)
    assert [t.dtype for t in (got[0], *got[1])] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.float32,
    ]
    _assert_close(got, _reference(inputs, grad), relative=0.03)


def test_gradcheck():
    x, gate_up, down, index, weight = _inputs(5)
    small = [t.detach()[..., :3].contiguous().requires_grad_() for t in (x, gate_up)]
    down = down.detach()[:, :3].contiguous().requires_grad_()

    def run(x, gate_up, down, weight):
        return expert_ffn(x, gate_up, down, index, weight, backend="fused")

    assert torch.autograd.gradcheck(run, (*small, down, weight), fast_mode=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_nothing(reentrant):
    inputs = _inputs(63)
    x, gate_up, down, index, weight = inputs
    leaves = (x, gate_up, down, weight)
    plain = _run("fused", inputs, torch.ones(63, D, dtype=torch.float64))
    y = checkpoint(expert_ffn, x, gate_up, down, index, weight, use_reentrant=reentrant)
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    torch.testing.assert_close(y, plain[0], rtol=0, atol=0)
    for leaf, want in zip(leaves, plain[1], strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_gets_no_gradient_and_disturbs_no_other(frozen):
    x, gate_up, down, index, weight = _inputs(20)
    want = _run("fused", (x, gate_up, down, index, weight), torch.ones(20, D, dtype=torch.float64))
    leaves = [x, gate_up, down, weight]
    leaves[frozen] = leaves[frozen].detach()
    y = expert_ffn(leaves[0], leaves[1], leaves[2], index, leaves[3])
    y.sum().backward()
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, want[1][i])


def test_non_contiguous_inputs():
    x, gate_up, down, index, weight = _inputs(40)
    grad = torch.randn(D, 40, dtype=torch.float64).T
    want = _run("fused", (x, gate_up, down, index, weight), grad)

    def strided(t):
        return t.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()

    index = index.T.contiguous().T
    got = _run("fused", (strided(x), strided(gate_up), strided(down), index, strided(weight)), grad)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_no_tokens_at_all(backend):
    """Under expert parallelism a rank may receive nothing; its gradients are zeros, not absent."""
    y, grads = _run(backend, _inputs(0), torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D)
    assert all(g is not None and not g.any() for g in grads)


def test_bf16_result_does_not_depend_on_other_tokens_of_the_expert():
    """Padding rows name token 0; whatever it holds must not reach anybody's output."""
    x, gate_up, down, index, weight = _inputs(50, dtype=torch.bfloat16)
    with torch.no_grad():
        want = expert_ffn(x, gate_up, down, index, weight, backend="fused")
        x[0] = float("nan")
        got = expert_ffn(x, gate_up, down, index, weight, backend="fused")
    assert torch.isnan(got[0]).all()
    torch.testing.assert_close(got[1:], want[1:], rtol=0, atol=0)


def test_two_runs_are_bit_equal():
    inputs = _inputs(100, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    grad = torch.randn(100, D, dtype=torch.bfloat16)
    first, second = _run("fused", inputs, grad), _run("fused", inputs, grad)
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_bf16_and_leaves_parameters_alone():
    inputs = _inputs(30, dtype=torch.float32)
    grad = torch.randn(30, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _run("fused", inputs, grad.bfloat16())
    assert got[0].dtype == torch.bfloat16
    assert {g.dtype for g in got[1]} == {torch.float32}
    _assert_close(got, _reference(inputs, grad), relative=0.03)


def test_unusable_backends_are_refused_by_name():
    inputs = _inputs(2)
    with pytest.raises(ConfigError, match="reference"):
        expert_ffn(*inputs, backend="magic")
    with pytest.raises(ConfigError, match="float64"):
        expert_ffn(*inputs, backend="grouped_mm")
