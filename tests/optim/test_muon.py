"""Muon against a naive loop, and the rate rule against the released shapes."""

from __future__ import annotations

import copy

import pytest
import torch

from trinity.ops.newton_schulz import orthogonalize
from trinity.optim.muon import Muon, lr_scale

OPTIONS = {"coefficients": "trinity", "num_iterations": 5, "dtype": torch.float64}


def _parameters() -> list[torch.nn.Parameter]:
    shapes = [(24, 8), (8, 24), (24, 8), (3, 2, 6, 10), (3, 10, 6), (5, 5)]
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_a_loop_over_single_matrices(
    nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trinity.optim.muon.MAX_BUCKET_ELEMENTS", 300)  # buckets split too
    lr, mu, decay = 0.1, 0.9, 0.05
    parameters = _parameters()
    expected = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in expected]
    optimizer = Muon(
        parameters, lr=lr, momentum=mu, nesterov=nesterov, weight_decay=decay, **OPTIONS
    )
    for _ in range(3):
        for parameter, weight, momentum in zip(parameters, expected, momenta, strict=True):
            parameter.grad = torch.randn_like(parameter)
            momentum.mul_(mu).add_(parameter.grad)
            direction = parameter.grad + mu * momentum if nesterov else momentum
            out_features, in_features = weight.shape[-2:]
            weights = weight.view(-1, out_features, in_features)
            for i, matrix in enumerate(direction.reshape(-1, out_features, in_features)):
                update = orthogonalize(matrix, **OPTIONS)
                scale = max(1, out_features / in_features) ** 0.5
                weights[i] = (1 - lr * decay) * weights[i] - lr * scale * update
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-12)


def test_gate_and_up_are_orthogonalised_apart() -> None:
    """Treating the fused (2F, D) matrix as one would give another update."""
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 6, 10, dtype=torch.float64))
    parameter.grad = torch.randn_like(parameter)
    Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, **OPTIONS).step()
    for half in range(2):
        values = torch.linalg.svdvals(parameter.detach()[0, half])
        assert float(values.min()) > 0.85
    fused = orthogonalize(parameter.grad.flatten(1, 2), **OPTIONS)
    assert float((fused.view_as(parameter) + parameter.detach()).abs().max()) > 0.1


def test_equals_torch_muon_where_the_rules_coincide() -> None:
    """torch's rule for square matrices with one quintic and no fused experts is the same."""
    ours = torch.nn.Parameter(torch.randn(16, 16))
    theirs = copy.deepcopy(ours)
    keller = {"coefficients": "keller", "num_iterations": 5, "dtype": torch.bfloat16}
    mine = Muon([ours], lr=0.02, momentum=0.95, nesterov=False, weight_decay=0.1, **keller)
    peer = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=False, weight_decay=0.1, adjust_lr_fn="original"
    )
    for _ in range(3):
        ours.grad = torch.randn(16, 16)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    # torch keeps an exponential mean where we keep a sum; the direction, hence the update, agrees.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("out_features", "in_features", "expected"),
    [
        (1024, 1024, 1.0),  # Nano q
        (256, 1024, 1.0),  # Nano k and expert gate
        (3072, 1024, 1.732),  # Nano dense gate
        (1024, 256, 2.0),  # Nano expert down
        (4096, 2048, 1.414),  # Mini q
        (6144, 3072, 1.414),  # Large q
        (12288, 3072, 2.0),  # Large dense gate
        (256, 3072, 1.0),  # Large router
    ],
)
def test_rate_rule_on_the_released_shapes(
    out_features: int, in_features: int, expected: float
) -> None:
    assert lr_scale(out_features, in_features) == pytest.approx(expected, abs=1e-3)


def test_vectors_are_refused_and_missing_gradients_skipped() -> None:
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(4, 4))


def test_bf16_gradients_feed_an_fp32_momentum() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
    parameter.grad = torch.randn_like(parameter)
    optimizer = Muon([parameter], lr=0.1)
    optimizer.step()
    assert optimizer.state[parameter]["momentum"].dtype == torch.float32
