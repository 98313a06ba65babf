"""What surrounds the kernels: errors, imports, references, layouts of states, decays, the table."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
import trinity_kernels as kernels
from trinity_kernels import tuning
from trinity_kernels.decay import chunk_decays, document_bounds, log_decay_gradient
from trinity_kernels.layout import HEAD_DIMS, heads_of
from trinity_kernels.reference import scan_dense, scan_recurrent, triangle_features
from trinity_kernels.triangle import (
    num_features,
    to_blocked,
    to_blocked_gradient,
    to_packed,
    to_packed_gradient,
)

FP64 = torch.float64


def _tokens(heads=(2, 2, 2), dims=(16, 16), num_tokens=8, dtype=torch.float32):
    (num_q, num_k, num_v), (d, e) = heads, dims
    return {
        "q_BSHd": torch.randn(2, num_tokens, num_q, d, dtype=dtype),
        "k_BSGd": torch.randn(2, num_tokens, num_k, d, dtype=dtype),
        "v_BSVe": torch.randn(2, num_tokens, num_v, e, dtype=dtype),
        "log_decay_BSV": -torch.rand(2, num_tokens, num_v, dtype=dtype),
    }


def test_import_brings_neither_triton_nor_cuda():
    code = (
        "import sys, torch, trinity_kernels\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_call_without_triton_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(kernels.KernelsUnavailableError, match="`dev` extra"):
        kernels.first_order_scan(**_tokens(), scale=1.0)


def test_a_call_on_a_cpu_names_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(kernels.KernelsUnavailableError, match="TRITON_INTERPRET=1"):
        kernels.causal_conv(torch.zeros(1, 4, 8), torch.zeros(8, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (3, 2, 2)}, "3 query, 2 key and 2 value heads"),
        ({"heads": (4, 2, 4)}, "4 query, 2 key and 4 value heads"),
        ({"dims": (24, 16)}, "head dim 24"),
        ({"num_tokens": 0}, "empty"),
        ({"dtype": FP64}, "float64"),
    ],
)
@pytest.mark.parametrize("scan", [kernels.first_order_scan, kernels.second_order_scan])
def test_tokens_that_do_not_fit_are_refused(scan, change, message):
    with pytest.raises(ValueError, match=message):
        scan(**_tokens(**change), scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_state": torch.zeros(2, 2, 16, 17)}, "initial_state has shape"),
        ({"document_ids_BS": torch.zeros(2, 9)}, "document_ids has shape"),
        ({"chunk_size": 48}, "chunk_size 48"),
        ({"precision": "bf16"}, "precision 'bf16'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("trinity_kernels.api.interpreting", lambda: True)
    with pytest.raises(ValueError, match=message):
        kernels.first_order_scan(**_tokens(), scale=1.0, **options)


def test_convolutions_that_do_not_fit_are_refused():
    x, weight = torch.zeros(1, 4, 8), torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"expected \(C, 2..4\)"):
        kernels.causal_conv(x, torch.zeros(8, 5))
    with pytest.raises(ValueError, match="initial has shape"):
        kernels.causal_conv(x, weight, initial_BwC=torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="activation 'gelu'"):
        kernels.causal_conv(x, weight, activation="gelu")


def test_head_layouts():
    assert heads_of(8, 2, 2)[3:] == (4, 1)
    assert heads_of(2, 2, 8)[3:] == (1, 4)
    assert heads_of(2, 2, 8).num_outputs == 8


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 2, 2), (2, 2, 4)])
def test_the_two_references_agree(power, normalize, heads):
    tokens = _tokens(heads, num_tokens=23, dtype=FP64)
    documents = torch.tensor([[0] * 23, [0] * 5 + [1] + [2] * 17])
    features = 136 if power == 2 else 16
    # Sums of weights of a first-order scan may have any sign: not something to divide by.
    normalize = normalize and power == 2
    initial = torch.rand(2, heads[2], features, 16 + normalize, dtype=FP64)
    options = {"scale": 0.25, "power": power, "normalize": normalize, "initial_state": initial}
    dense = scan_dense(**tokens, **options, document_ids_BS=documents)
    recurrent = scan_recurrent(**tokens, **options, document_ids_BS=documents)
    for a, b in zip(dense, recurrent, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_features_of_the_triangle_square_the_product():
    x, y = torch.randn(2, 5, 16, dtype=FP64)
    assert triangle_features(torch.tensor([2.0, 3.0])).tolist() == pytest.approx(
        [4.0, 2.0**0.5 * 6.0, 9.0]
    )
    product = (triangle_features(x) * triangle_features(y)).sum(1)
    torch.testing.assert_close(product, (x * y).sum(1) ** 2)


def _assert_same_sum(total, terms):
    torch.testing.assert_close(total, terms.sum(), rtol=0.0, atol=1e-5 * float(terms.abs().sum()))


@pytest.mark.parametrize(("d", "block"), [(16, 16), (16, 8), (32, 8), (64, 16)])
@pytest.mark.parametrize("normalize", [False, True])
def test_packed_and_blocked_states_are_inverse(d, block, normalize):
    packed = torch.randn(2, d * (d + 1) // 2, 4)
    blocked = to_blocked(packed, d, block, normalize=normalize)
    assert blocked.values.shape == (2, num_features(d, block), 4 - normalize)
    torch.testing.assert_close(to_packed(blocked, d, block), packed)
    # Both maps are linear, so <g, A x> = <A^T g, x> settles their gradients.
    grad = to_blocked(torch.randn_like(packed), d, block, normalize=normalize)
    forward = (grad.values * blocked.values).sum()
    if grad.sums is not None and blocked.sums is not None:
        forward = forward + (grad.sums * blocked.sums).sum()
    _assert_same_sum(forward, to_blocked_gradient(grad, d, block) * packed)
    other = torch.randn_like(packed)
    back = to_packed_gradient(other, d, block, normalize=normalize)
    forward = (back.values * blocked.values).sum()
    if back.sums is not None and blocked.sums is not None:
        forward = forward + (back.sums * blocked.sums).sum()
    _assert_same_sum(forward, other * packed)


def test_a_final_state_is_fp32_under_autocast():
    tokens = _tokens(heads=(2, 2, 4))
    del tokens["q_BSHd"]
    plain = kernels.first_order_final_state(**tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = kernels.first_order_final_state(**tokens)
    assert state.dtype == torch.float32
    assert torch.equal(state, plain)


def test_bounds_of_documents():
    bounds = document_bounds(torch.tensor([[4, 4, 4, 7, 9, 9], [1, 1, 1, 1, 1, 1]]))
    assert bounds.begin_BS.tolist() == [[0, 0, 0, 3, 4, 4], [0] * 6]
    assert bounds.end_BS.tolist() == [[3, 3, 3, 4, 6, 6], [6] * 6]


def test_decays_of_chunks_by_hand():
    log_decay = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]).reshape(1, 5, 1)
    decays = chunk_decays(log_decay, torch.tensor([[0, 0, 0, 1, 1]]), 2)
    e = torch.exp
    assert decays.prefix_BVS.tolist() == [[[-1, -3, -4, -12, -16]]]
    x = torch.tensor([-1.0, -3.0, -4.0, -16.0, -2.0, -8.0])
    want_into = torch.stack([e(x[0]), e(x[1]), e(x[2]), torch.tensor(0.0), e(x[3])])
    torch.testing.assert_close(decays.into_BVS[0, 0], want_into)
    want_out = torch.stack([e(x[4]), e(x[0] * 0), torch.tensor(0.0), e(x[0] * 0), e(x[0] * 0)])
    torch.testing.assert_close(decays.out_BVS[0, 0], want_out)
    want_through = torch.stack([e(x[1]), torch.tensor(0.0), e(x[3])])
    torch.testing.assert_close(decays.through_BVN[0, 0], want_through)


def test_gradient_of_decays_by_hand():
    pairs = torch.tensor([[[1.0, 2.0, 3.0, 10.0, 20.0]]])
    leaving = torch.tensor([[[0.1, 0.2, 0.4, 0.8, 1.6]]])
    through = torch.tensor([[[100.0, 200.0]]])
    got = log_decay_gradient(pairs, leaving, through, 3)
    assert got.flatten().tolist() == pytest.approx([106.0, 105.1, 103.3, 230.0, 220.8])


def test_the_table_knows_every_kernel_and_width():
    device = torch.device("cpu")
    for kernel in ("first_order", "second_order", "forgetting_attention"):
        names = {tuple(tuning.settings(kernel, d, device)) for d in HEAD_DIMS}
        assert len(names) == 1
    assert tuning.settings("causal_conv", tuning.ANY_WIDTH, device)["num_warps"] > 0
    with tuning.override("first_order", chunk=16):
        assert tuning.settings("first_order", 64, device)["chunk"] == 16
    assert tuning.settings("first_order", 64, device)["chunk"] != 16


def test_a_measured_row_wins_over_any(monkeypatch):
    table = {"first_order": {"any": {"64": {"chunk": 64}}, "sm_90": {"64": {"chunk": 128}}}}
    monkeypatch.setattr(tuning, "load_table", lambda: table)
    monkeypatch.setattr(tuning, "_capability", lambda device: device.type)
    assert tuning.settings("first_order", 64, torch.device("cpu")) == {"chunk": 64}
    monkeypatch.setattr(tuning, "_capability", lambda device: "sm_90")
    assert tuning.settings("first_order", 64, torch.device("cpu")) == {"chunk": 128}
