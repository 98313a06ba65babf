"""A compiled region around our operations computes what they compute, values and gradients."""

from __future__ import annotations

import torch

from trinity.ops import elementwise as ew
from trinity.ops.attention import causal_attention
from trinity.ops.common import not_traced
from trinity.ops.grouped_mm import expert_ffn
from trinity.ops.loss import linear_cross_entropy

S, D, E = 48, 32, 4


def test_every_operation_inside_one_compiled_region():
    gen = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=gen).requires_grad_()
        for shape in ((1, S, D), (D,), (E, 2, 16, D), (E, D, 16), (S, 2), (50, D))
    ]
    index = torch.randint(E, (S, 2), generator=gen)
    target = torch.randint(50, (S,), generator=gen)
    ids = (torch.arange(S) // 30).unsqueeze(0)
    cos_sin = torch.ones(S, 8), torch.zeros(S, 8)

    def network(x, gain, gate_up, down, weight, head):
        normed = ew.rms_norm(x, gain, 1e-5)
        q = ew.rotary(normed.view(1, S, 4, 8).transpose(1, 2), *cos_sin)
        k, v = q[:, :2], q[:, 2:]
        local = causal_attention(q, k, v, window=20, document_ids_BS=ids)
        everywhere = causal_attention(q, k, v, window=None, document_ids_BS=ids, backend="sdpa")
        mixed = (local + everywhere).transpose(1, 2).flatten(2)
        mixed = ew.sigmoid_gate(mixed, normed) + ew.swiglu(normed, mixed)
        routed = sum(
            expert_ffn(mixed[0], gate_up, down, index, weight, backend=backend)
            for backend in ("fused", "grouped_mm")
        )
        return linear_cross_entropy(routed, head, target, z_loss=1e-3, chunk_rows=20).total

    def run(function):
        total = function(*leaves)
        return total, *torch.autograd.grad(total, leaves)

    for a, b in zip(run(torch.compile(network, backend="aot_eager")), run(network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_not_traced_keeps_a_function_whole_and_its_name():
    traced = []

    @not_traced
    def inner(x):
        traced.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(lambda x: inner(x * 2), backend="eager")
    assert inner.__name__ == "inner"
    assert compiled(torch.ones(1)).item() == 3.0
    assert traced == [False]
