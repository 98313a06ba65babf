"""A long row is worked off in spans of chunks: how many there are changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trinity.ops import chunked_scan
from trinity.ops.scan import scan

BATCH, DIM, VALUE_DIM = 2, 8, 12


def _results(heads: tuple[int, int, int], num_tokens: int) -> list[Tensor]:
    """Output, state and all gradients; documents, and a state before the first one."""
    num_q, num_k, num_v = heads
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = [
        normal(BATCH, num_tokens, num_q, DIM),
        normal(BATCH, num_tokens, num_k, DIM),
        normal(BATCH, num_tokens, num_v, VALUE_DIM),
        -normal(BATCH, num_tokens, num_v).exp() / 50,
        normal(BATCH, num_v, DIM, VALUE_DIM),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    # Row 0: documents that start at and beside the edges of chunks. Row 1: one document.
    ids_BS = torch.zeros(BATCH, num_tokens, dtype=torch.int64)
    for start in (64, 127, 257):
        ids_BS[0, start:] += 1
    out = scan(*leaves[:4], initial_state=leaves[4], document_ids_BS=ids_BS, backend="chunked")
    results = [out.out_BSHe, out.state]
    grads = torch.autograd.grad(results, leaves, [normal(*x.shape) for x in results])
    return [x.detach() for x in (*results, *grads)]


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (2, 2, 6)])
@pytest.mark.parametrize("num_tokens", [128, 300])
def test_one_span_or_many(
    heads: tuple[int, int, int], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_scan, "SPAN_WEIGHTS", 2**40)
    together = _results(heads, num_tokens)
    for spans_of in (1, 2):  # chunks
        weights = BATCH * heads[2] * spans_of * chunked_scan.CHUNK_TOKENS**2
        monkeypatch.setattr(chunked_scan, "SPAN_WEIGHTS", weights)
        for a, b in zip(_results(heads, num_tokens), together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_compiled_region_may_hold_scans() -> None:
    leaves = [torch.randn(1, 200, 2, 8, requires_grad=True) for _ in range(3)]
    log_decay_BSU = torch.full((1, 200, 2), -0.1)

    def network(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = scan(q * 2, k, v, log_decay_BSU).out_BSHe
        return scan(first, k, v, log_decay_BSU, power=2, normalize=True).out_BSHe.square().sum()

    compiled = torch.compile(network, backend="aot_eager")
    expected = torch.autograd.grad(network(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
