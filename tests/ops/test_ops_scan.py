"""Scans: one function, several ways to compute it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops import squared_scan
from trinity.ops.chunked_scan import chunked_scan
from trinity.ops.features import (
    num_features,
    tile_features,
    tiles_of,
    tiles_to_triangle,
    triangle_features,
    triangle_to_tiles,
)
from trinity.ops.scan import (
    BACKENDS,
    ScanInputs,
    decode_step,
    empty_state,
    final_state,
    scan,
)

LENGTHS = [1, 63, 100, 257]
HEADS = {"one to one": (2, 2, 2), "grouped queries": (4, 2, 2), "grouped keys": (2, 2, 6)}
ORDERS = {"first": (1, False), "second": (2, False), "second, divided": (2, True)}


def _inputs(
    length: int,
    heads: tuple[int, int, int],
    order: tuple[int, bool],
    *,
    documents: bool,
    state: bool,
    dim: int = 20,
    value_dim: int = 5,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random tensors. Queries and keys lean to one side: a sum of weights near zero has no digits
    left in the recurrent form."""
    generator = torch.Generator().manual_seed(length)
    num_q, num_k, num_v = heads
    power, normalize = order

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    lean = 2.0 if normalize else 0.0
    inputs: dict[str, Any] = {
        "q": normal(batch, length, num_q, dim),
        "k": normal(batch, length, num_k, dim),
        "v": normal(batch, length, num_v, value_dim),
        "log_decay": (-torch.rand(batch, length, num_v, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_(),
    }
    with torch.no_grad():
        inputs["q"] += lean
        inputs["k"] += lean
    inputs["document_ids"] = None
    if documents:
        begins = torch.rand(batch, length, generator=generator) < 0.08
        inputs["document_ids"] = begins.cumsum(1) * 3 + 1
    inputs["initial_state"] = None
    if state:
        # A state that some tokens have led to.
        with torch.no_grad():
            k, v = torch.randn(batch, 9, num_k, dim), torch.randn(batch, 9, num_v, value_dim)
            k, v = (k + lean).to(dtype), v.to(dtype)
            zero = torch.zeros(batch, 9, num_v, dtype=dtype)
            before = final_state(k, v, zero, power=power, normalize=normalize)
        inputs["initial_state"] = before.requires_grad_()
    return inputs


def _run(
    inputs: dict[str, Any], order: tuple[int, bool], backend: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, final state, and the gradient of every input."""
    out, state = scan(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs["log_decay"],
        power=order[0],
        normalize=order[1],
        document_ids_BS=inputs["document_ids"],
        initial_state=inputs["initial_state"],
        backend=backend,
    )
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, state)
    ]
    loss = (out * weights[0]).sum() + (state * weights[1]).sum()
    return out.detach(), state.detach(), list(torch.autograd.grad(loss, leaves))


def _assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    for a, e in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert a.shape == e.shape
        scale = e.abs().max().clamp(min=1.0)
        assert float((a - e).abs().max() / scale) < tolerance


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second-order scans of the test's short rows in chunks, too."""
    monkeypatch.setattr(squared_scan, "QUADRATIC_TOKENS", {64: 0})
    monkeypatch.setattr(squared_scan, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(squared_scan, "BLOCK_TOKENS", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_recurrent_quadratic_and_chunked_are_the_same(
    order: tuple[int, bool],
    heads: tuple[int, int, int],
    length: int,
    documents: bool,
    state: bool,
) -> None:
    inputs = _inputs(length, heads, order, documents=documents, state=state)
    expected = _run(inputs, order, "recurrent")
    for backend in ("quadratic", "chunked"):
        _assert_equal(_run(inputs, order, backend), expected, 1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 50, 64, 300])
@pytest.mark.parametrize("order", ["first", "second"])
def test_the_size_of_chunks_does_not_matter(order: str, chunk_tokens: int) -> None:
    power, normalize = ORDERS[order]
    inputs = _inputs(100, (2, 2, 2), (power, normalize), documents=True, state=True)
    leaves = [inputs[name] for name in ("q", "k", "v", "log_decay", "initial_state")]
    given = ScanInputs(
        *leaves[:4], power, normalize, 0.3, inputs["document_ids"], inputs["initial_state"]
    )
    compute = chunked_scan if power == 1 else squared_scan.squared_scan
    results = []
    for size in (chunk_tokens, 7):
        out, state = compute(given, size)
        grads = torch.autograd.grad(out.square().sum() + state.square().sum(), leaves)
        results.append((out, state, list(grads)))
    _assert_equal(*results, 1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_gradcheck(order: tuple[int, bool]) -> None:
    inputs = _inputs(40, (2, 1, 1), order, documents=True, state=True, dim=3, value_dim=2, batch=1)
    ids = inputs["document_ids"]

    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            scan(
                q,
                k,
                v,
                a,
                power=order[0],
                normalize=order[1],
                document_ids_BS=ids,
                initial_state=state,
                backend="chunked",
            )
        )

    leaves = [inputs[name] for name in ("q", "k", "v", "log_decay", "initial_state")]
    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_of_2mamba_by_formula() -> None:
    """dX = 2 X decay R / sum(p), R = dP - rowsum(dO O); only columns of p R reach the decays."""
    dim, length = 6, 33
    inputs = _inputs(length, (1, 1, 1), (2, True), documents=False, state=False, dim=dim, batch=1)
    out, _, (grad_q, grad_k, grad_v, grad_a) = _run(inputs, (2, True), "chunked")
    q, k, v = (inputs[name].detach()[0, :, 0] for name in ("q", "k", "v"))
    sums = inputs["log_decay"].detach()[0, :, 0].cumsum(0)
    x = q @ k.T * dim**-0.5
    decay = (sums[:, None] - sums).exp().tril()
    p = x.square() * decay
    total = p.sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(1)
    grad_o = torch.randn(out.shape, generator=generator, dtype=torch.float64)[0, :, 0]
    # The final state's gradient of _run is left out: redo it with the output alone.
    o, _ = scan(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], power=2, normalize=True)
    grad_q, grad_k, grad_v, grad_a = torch.autograd.grad(
        (o[0, :, 0] * grad_o).sum(),
        [inputs[n] for n in ("q", "k", "v", "log_decay")],
    )
    r = grad_o @ v.T - (grad_o * o[0, :, 0]).sum(1, keepdim=True)
    grad_x = 2 * x * decay * r / total
    share = p / total * r
    torch.testing.assert_close(grad_q[0, :, 0], grad_x @ k * dim**-0.5, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_k[0, :, 0], grad_x.T @ q * dim**-0.5, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_v[0, :, 0], (p / total).T @ grad_o, rtol=1e-10, atol=1e-12)
    assert float(share.sum(1).abs().max()) < 1e-12  # the row term vanishes
    by_column = -share.sum(0).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(grad_a[0, :, 0], by_column, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["recurrent", "quadratic", "chunked"])
def test_the_first_token_of_a_document_returns_its_value(backend: str) -> None:
    inputs = _inputs(50, (4, 2, 2), (2, True), documents=True, state=False)
    out, _, _ = _run(inputs, (2, True), backend)
    ids, v = inputs["document_ids"], inputs["v"].detach().repeat_interleave(2, dim=2)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    torch.testing.assert_close(out[first], v[first], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_final_state_alone(order: tuple[int, bool]) -> None:
    inputs = _inputs(90, (2, 2, 4), order, documents=True, state=False)
    names = ("k", "v", "log_decay")
    leaves = [inputs[name] for name in names]
    options: dict[str, Any] = {
        "power": order[0],
        "normalize": order[1],
        "document_ids_BS": inputs["document_ids"],
    }
    alone = final_state(*leaves, **options)
    whole = scan(inputs["q"], *leaves, **options, backend="recurrent").state
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(
        torch.autograd.grad(alone.square().sum(), leaves),
        torch.autograd.grad(whole.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_steps_and_pieces_make_the_whole(order: tuple[int, bool]) -> None:
    """Prefill in pieces, then token by token, from state to state."""
    inputs = _inputs(40, (4, 2, 2), order, documents=False, state=False)
    options: dict[str, Any] = {"power": order[0], "normalize": order[1]}
    tensors = [inputs[name].detach() for name in ("q", "k", "v", "log_decay")]
    whole = scan(*tensors, **options)
    state = empty_state(tensors[1], tensors[2], **options)
    outs = []
    for start, stop in ((0, 17), (17, 30)):
        out, state = scan(*(t[:, start:stop] for t in tensors), **options, initial_state=state)
        outs.append(out)
    for t in range(30, 40):
        out, state = decode_step(*(x[:, t] for x in tensors), state, **options)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole.out_BSHe, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, whole.state, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_without_the_final_state(order: tuple[int, bool], state: bool) -> None:
    """It is left out of the forward and, when nothing is made of it, of the backward."""
    inputs = _inputs(100, (4, 2, 2), order, documents=True, state=state)
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    results = []
    for return_state, backend in ((False, "chunked"), (True, "chunked"), (True, "quadratic")):
        out, final = scan(
            *(inputs[name] for name in ("q", "k", "v", "log_decay")),
            power=order[0],
            normalize=order[1],
            document_ids_BS=inputs["document_ids"],
            initial_state=inputs["initial_state"],
            return_state=return_state,
            backend=backend,
        )
        assert (final is not None) == return_state
        results.append((out, out, list(torch.autograd.grad(out.square().sum(), leaves))))
    _assert_equal(results[0], results[2], 1e-11)
    _assert_equal(results[1], results[2], 1e-11)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_nothing_crosses_a_document(order: tuple[int, bool]) -> None:
    inputs = _inputs(120, (2, 2, 2), order, documents=True, state=False)
    before, _, _ = _run(inputs, order, "chunked")
    ids, place = inputs["document_ids"], 60
    with torch.no_grad():
        for name in ("q", "k", "v", "log_decay"):
            inputs[name][0, place] -= 1.0
    after, _, _ = _run(inputs, order, "chunked")
    own = ids[0] == ids[0, place]
    changed = (after[0] != before[0]).flatten(1).any(1)
    assert changed[place]
    assert not changed[~own].any()
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("decay", [-1e4, -60.0, 0.0])
def test_any_decay_is_finite(order: tuple[int, bool], decay: float) -> None:
    inputs = _inputs(130, (2, 2, 2), order, documents=True, state=True, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_decay"].fill_(decay)
    out, state, grads = _run(inputs, order, "chunked")
    assert all(bool(torch.isfinite(t).all()) for t in (out, state, *grads))


def test_rows_without_weight_are_zero_not_nan() -> None:
    inputs = _inputs(80, (2, 2, 2), (2, True), documents=False, state=False, dtype=torch.float32)
    with torch.no_grad():
        inputs["q"].zero_()
    out, _, grads = _run(inputs, (2, True), "chunked")
    assert torch.equal(out[:, 0], inputs["v"][:, 0])  # nothing else to see there
    assert float(out[:, 1:].abs().max()) == 0
    assert all(bool(torch.isfinite(t).all()) for t in grads)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_narrow_types(order: tuple[int, bool], dtype: torch.dtype, tolerance: float) -> None:
    inputs = _inputs(257, (2, 2, 2), order, documents=True, state=False, dtype=dtype, dim=32)
    inputs["log_decay"] = inputs["log_decay"].detach().float().requires_grad_()
    exact = {
        name: t.detach().double().requires_grad_()
        if isinstance(t, Tensor) and t.requires_grad
        else t
        for name, t in inputs.items()
    }
    _assert_equal(_run(inputs, order, "chunked"), _run(exact, order, "quadratic"), tolerance)


def test_features() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (1, 5, 16, 20, 48):
        x, y = torch.randn(2, 7, dim, generator=generator, dtype=torch.float64)
        square = (x @ y.T).square()
        triangle = triangle_features(x)
        assert triangle.shape[-1] == num_features(dim, 2)
        torch.testing.assert_close(triangle @ triangle_features(y).T, square)
        tiles = torch.cat([tile_features(x.T[None], tile)[0] for tile in tiles_of(dim)])
        torch.testing.assert_close(triangle_to_tiles(triangle.T, dim), tiles)
        torch.testing.assert_close(tiles_to_triangle(tiles, dim), triangle.T)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ((4, 2, 6), {}, "heads of q must be a multiple"),
        ((3, 2, 2), {}, "heads of q must be a multiple"),
        ((2, 2, 2), {"power": 3}, "no scan of power=3"),
        ((2, 2, 2), {"normalize": True}, "no scan of power=1 with normalize=True"),
        ((2, 2, 2), {"backend": "magic"}, "'magic' does not exist; use one of auto"),
    ],
)
def test_what_does_not_fit_is_refused(
    heads: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    inputs = _inputs(5, heads, (1, False), documents=False, state=False)
    with pytest.raises(ConfigError, match=message):
        scan(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], **options)


def test_every_backend_has_a_name() -> None:
    assert set(BACKENDS) >= {"chunked", "quadratic", "recurrent", "triton", "mamba-ssm"}
