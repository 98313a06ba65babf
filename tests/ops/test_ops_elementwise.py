"""The fused chains against their references: value, every gradient, odd sizes, layouts, dtypes."""

from __future__ import annotations

import pytest
import torch

from trinity.ops import common
from trinity.ops import elementwise as ew


def _tables(num_positions, head_dim, dtype):
    angle = torch.outer(
        torch.arange(num_positions, dtype=dtype),
        torch.linspace(1.0, 0.01, head_dim // 2, dtype=dtype),
    )
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _norm(x, weight):
    return ew.rms_norm(x, weight, 1e-5), ew.rms_norm_reference(x, weight, 1e-5)


def _swiglu(gate, up):
    return ew.swiglu(gate, up), gate * torch.sigmoid(gate) * up


def _gate(x, gate):
    return ew.sigmoid_gate(x, gate), x / (1 + torch.exp(-gate))


def _rotary(x, _):
    tables = _tables(x.shape[-2], x.shape[-1], torch.float64)
    return ew.rotary(x, *tables), ew.rotary_reference(x, *tables)


def _rotary_by_row(x, _):
    """Other positions in each row."""
    cos, sin = _tables(x.shape[0] * x.shape[-2], x.shape[-1], torch.float64)
    tables = [table.unflatten(0, (x.shape[0], -1)) for table in (cos, sin)]
    rows = [ew.rotary_reference(row, *table) for row, *table in zip(x, *tables, strict=True)]
    return ew.rotary(x, *tables), torch.stack(rows)


CASES = {
    "norm": _norm,
    "swiglu": _swiglu,
    "gate": _gate,
    "rotary": _rotary,
    "rotary_by_row": _rotary_by_row,
}


def _grads(out, inputs, grad):
    used = torch.autograd.grad(out, inputs, grad, allow_unused=True, retain_graph=True)
    return [g for g in used if g is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 63, 100, 257])
@pytest.mark.parametrize("contiguous", [True, False])
def test_value_and_gradients_equal_the_reference(case, length, contiguous):
    torch.manual_seed(0)
    x = torch.randn(2, 3, length, 8, dtype=torch.float64)
    if not contiguous:
        x = torch.randn(2, length, 3, 16, dtype=torch.float64)[..., ::2].transpose(1, 2)
    x = x.detach().requires_grad_()
    other_shape = (8,) if case == "norm" else x.shape
    other = torch.randn(other_shape, dtype=torch.float64, requires_grad=True)
    fast, slow = CASES[case](x, other)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    grad = torch.randn(fast.shape, dtype=torch.float64)
    for a, b in zip(_grads(fast, (x, other), grad), _grads(slow, (x, other), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_broadcast_gradient_is_accepted(case):
    """``sum().backward()`` hands over a gradient of stride zero; nothing may write into it."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    shape = (8,) if case == "norm" else x.shape
    other = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    fast, slow = CASES[case](x, other)
    ones = torch.ones((), dtype=torch.float64).expand(fast.shape)
    for a, b in zip(_grads(fast, (x, other), ones), _grads(slow, (x, other), ones), strict=True):
        torch.testing.assert_close(a, b)


def test_norm_of_bf16_rounds_once_and_keeps_an_fp32_gain():
    torch.manual_seed(0)
    x = torch.randn(100, 32, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.randn(32, requires_grad=True)
    out = ew.rms_norm(x, gain, 1e-5)
    assert out.dtype == torch.bfloat16
    exact = ew.rms_norm_reference(x.double(), gain.double(), 1e-5)
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0.0, atol=0.0)
    out.backward(torch.randn_like(out))
    assert [t.grad.dtype for t in (x, gain)] == [torch.bfloat16, torch.float32]


def test_norm_of_a_vector_and_of_zeros():
    gain = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ew.rms_norm(x, gain, 1e-5).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 1e-5**-0.5, dtype=torch.float64))


def test_gradients_only_where_asked():
    x = torch.randn(3, 4)
    gain = torch.ones(4, requires_grad=True)
    ew.rms_norm(x, gain, 1e-5).sum().backward()
    assert gain.grad is not None
    x.requires_grad_()
    ew.rms_norm(x, gain.detach(), 1e-5).sum().backward()
    assert x.grad is not None


def test_rotation_keeps_lengths_and_relative_angles():
    torch.manual_seed(0)
    cos, sin = _tables(40, 16, torch.float64)
    q = torch.randn(16, dtype=torch.float64).expand(40, 16)
    k = torch.randn(16, dtype=torch.float64).expand(40, 16)
    rotated_q, rotated_k = ew.rotary(q, cos, sin), ew.rotary(k, cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[7, 3], scores[35, 31])
    assert not torch.allclose(scores[7, 3], scores[35, 30])


def test_rows_that_share_positions_share_tables():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 16)
    cos, sin = _tables(40, 16, torch.float32)
    shared = ew.rotary(x, cos, sin)
    assert torch.equal(ew.rotary(x, cos[None], sin[None]), shared)
    assert torch.equal(ew.rotary(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1)), shared)
    torch.testing.assert_close(ew.rotary_reference(x, cos[None], sin[None]), shared)


def test_compute_dtype_follows_autocast_but_never_narrows_fp64():
    x = torch.zeros(1)
    assert common.compute_dtype(x) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert common.compute_dtype(x) == torch.bfloat16
        assert common.compute_dtype(x.double()) == torch.float64
        with common.exact_dtypes(x):
            assert (x.view(1, 1) @ x.view(1, 1)).dtype == torch.float32
