"""Scans by other packages: what they are handed, what they refuse, what is said without them.

Those that can run here do so in ``reference_cases.py``. On a GPU all must agree with our own.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from trinity.core.errors import ConfigError
from trinity.ops import scan_backends
from trinity.ops.scan import scan

PACKAGES = {"mamba-ssm": "mamba_ssm", "retention": "retention", "fla": "fla"}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba-ssm": {},
    "retention": {"power": 2, "normalize": True},
    "fla": {},
}


def _tokens(*, heads: tuple[int, int, int] = (2, 2, 2), dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_q, num_k, num_v = heads

    def normal(num_heads: int) -> Tensor:
        return torch.randn(2, 40, num_heads, dim, generator=generator)

    log_decay_BSU = -0.01 - torch.rand(2, 40, num_v, generator=generator)
    return [normal(num_q), normal(num_k), normal(num_v), log_decay_BSU]


def _results(
    leaves: list[Tensor], backend: str, state: Tensor | None = None, **options: Any
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (*leaves, *(() if state is None else (state,)))]
    out = scan(
        *inputs[:4], initial_state=None if state is None else inputs[4], backend=backend, **options
    )
    generator = torch.Generator().manual_seed(1)
    sent = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    return [*out, *torch.autograd.grad(list(out), inputs, sent)]


def _assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert error < tolerance, (i, error)


@pytest.mark.parametrize("heads", [(2, 2, 2), (2, 2, 4)])
@pytest.mark.parametrize("with_state", [False, True])
def test_mamba_ssm_is_handed_what_it_takes(
    heads: tuple[int, int, int], with_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' function of the same arguments stands in for the kernel."""
    asked: list[object] = []

    def stand_in(*arguments: Tensor, seq_idx: Tensor | None, **options: Any) -> object:
        asked.append(seq_idx)
        return mamba2_chunk_scan(*arguments, **options)

    monkeypatch.setattr(scan_backends, "imported", lambda *_: stand_in)
    tokens = _tokens(heads=heads)
    state = torch.randn(2, heads[2], 16, 16) if with_state else None
    _assert_close(_results(tokens, "mamba-ssm", state), _results(tokens, "recurrent", state), 1e-5)
    scan(*tokens, document_ids_BS=torch.tensor([[5] * 20 + [4] * 20] * 2), backend="mamba-ssm")
    assert asked[0] is None
    assert isinstance(asked[1], Tensor)
    assert asked[1].tolist() == [[0] * 20 + [1] * 20] * 2


@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError])
def test_a_package_that_does_not_import_is_absent(
    backend: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise error(f"{name} does not work")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(ConfigError, match=r"needs the package .* 'trinity-pretrain\[cuda\]'"):
        scan(*_tokens(), backend=backend, **OPTIONS[backend])


@pytest.mark.parametrize(
    ("backend", "heads", "dim", "options", "reason"),
    [
        ("mamba-ssm", (2, 2, 2), 16, {"power": 2}, "power 2"),
        ("mamba-ssm", (4, 2, 2), 16, {}, "grouped queries"),
        ("fla", (2, 2, 2), 16, {"power": 2}, "power 2"),
        ("retention", (2, 2, 2), 16, {}, "squared"),
        ("retention", (2, 2, 2), 16, {"power": 2}, "squared"),
        ("retention", (2, 2, 4), 16, {"power": 2, "normalize": True}, "as many heads"),
        ("retention", (2, 2, 2), 24, {"power": 2, "normalize": True}, "multiple of 16"),
    ],
)
def test_refuses_what_it_cannot_do(
    backend: str, heads: tuple[int, int, int], dim: int, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{backend}.*{reason}"):
        scan(*_tokens(heads=heads, dim=dim), backend=backend, **options)


def test_retention_refuses_documents_and_states() -> None:
    tokens, options = _tokens(), OPTIONS["retention"]
    ids_BS, state = torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2, 2, 16 * 17 // 2, 17)
    with pytest.raises(ConfigError, match="documents"):
        scan(*tokens, document_ids_BS=ids_BS, backend="retention", **options)
    with pytest.raises(ConfigError, match="layout"):
        scan(*tokens, initial_state=state, backend="retention", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu_it_computes_what_ours_does(backend: str, documents: bool) -> None:
    pytest.importorskip(PACKAGES[backend])
    if documents and backend == "retention":
        pytest.skip("knows no documents")
    tokens = [x.cuda() for x in _tokens(dim=64)]
    options = dict(OPTIONS[backend])
    if documents:
        options["document_ids_BS"] = torch.tensor([[5] * 20 + [4] * 20] * 2).cuda()
    # Their products are of TF32 grade.
    _assert_close(
        _results(tokens, backend, **options), _results(tokens, "quadratic", **options), 2e-2
    )
