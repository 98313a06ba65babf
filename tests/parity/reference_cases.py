"""Our scans and attention against outside references, which only this process can import.

    python -m tests.parity.reference_cases FOLDER_OF_THE_REFERENCES

prints the errors of every case as JSON in its last line. Each error is the largest difference over
the largest entry; of results, and of the gradients of all inputs from random ones of the results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from trinity.ops import scan_backends, squared_scan
from trinity.ops.attention import forgetting_attention
from trinity.ops.scan import scan

Errors = dict[str, float]
Results = tuple[Tensor, ...]

PACKAGES = ("einops", "fla", "retention")
READY = ".venv/references/.ready"
"""What ``make`` makes once the packages are installed."""

BATCH, DIM = 2, 16
SMALL_CHUNKS = {"CHUNK_TOKENS": 32, "BLOCK_TOKENS": 8, "QUADRATIC_TOKENS": {64: 0}}


def _inputs(num_tokens: int, heads: tuple[int, int], value_dim: int) -> dict[str, Tensor]:
    num_q, num_k = heads
    generator = torch.Generator().manual_seed(num_tokens)
    normal = functools.partial(torch.randn, generator=generator)
    inputs = {
        "q": normal(BATCH, num_tokens, num_q, DIM),
        "k": normal(BATCH, num_tokens, num_k, DIM),
        "v": normal(BATCH, num_tokens, num_k, value_dim),
        "log_decay": -torch.nn.functional.softplus(normal(BATCH, num_tokens, num_k) - 1.0),
    }
    # retention takes log(|q . k| + 1e-6): a first token with a small product, whose output should
    # not depend on it, gets a gradient from that.
    inputs["q"][:, 0] += inputs["k"][:, 0].repeat_interleave(num_q // num_k, dim=1)
    return inputs


def _compare(
    ours: Callable[..., Results], theirs: Callable[..., Results], inputs: dict[str, Tensor]
) -> Errors:
    own = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    peer = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    results, peer_results = ours(**own), theirs(**peer)
    sent = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in peer_results]
    torch.autograd.backward(results, sent)
    torch.autograd.backward(peer_results, sent)
    errors = {
        f"result {i}": _error(a, b)
        for i, (a, b) in enumerate(zip(results, peer_results, strict=True))
    }
    for name in inputs:
        errors[f"gradient of {name}"] = _error(own[name].grad, peer[name].grad)
    return errors


def _error(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    # A single token has gradients that are exactly zero.
    return float((ours - theirs).detach().abs().max() / (theirs.detach().abs().max() or 1.0))


def _retention(num_tokens: int, heads: tuple[int, int], chunk: int | None, backend: str) -> Errors:
    """2Mamba's core: squared weights over their sum."""
    peer = importlib.import_module("retention.reference").power_retention

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        return (scan(q, k, v, log_decay, power=2, normalize=True, backend=backend).out_BSHe,)

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        return (peer(q, k, v, log_G=log_decay, deg=2, scale=DIM**-0.5, chunk_size=chunk),)

    # Small chunks, so that a short row has several and is still formed weight by weight elsewhere.
    with mock.patch.multiple(squared_scan, **SMALL_CHUNKS):
        return _compare(ours, theirs, _inputs(num_tokens, heads, DIM))


def _gla_parallel(num_tokens: int, backend: str) -> Errors:
    """Mamba-2S's core: weights q . k with a decay."""
    peer = importlib.import_module("fla.ops.simple_gla.naive").naive_parallel_simple_gla

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        return (scan(q, k, v, log_decay, backend=backend).out_BSHe,)

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        return (peer(q, k, v, log_decay)[0],)

    return _compare(ours, theirs, _inputs(num_tokens, (3, 3), 24))


def _gla_recurrent(num_tokens: int, backend: str) -> Errors:
    """The same from a state to a state."""
    peer = importlib.import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Results:
        return tuple(scan(q, k, v, log_decay, initial_state=state, backend=backend))

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Results:
        return peer(q, k, v, log_decay, initial_state=state, output_final_state=True)

    inputs = _inputs(num_tokens, (3, 3), 24)
    inputs["state"] = torch.randn(BATCH, 3, DIM, 24, generator=torch.Generator().manual_seed(2))
    return _compare(ours, theirs, inputs)


def _forgetting(num_tokens: int, heads: tuple[int, int], backend: str) -> Errors:
    """2Mamba-E's core: softmax attention with a decay per head of keys."""
    peer = importlib.import_module("fla.ops.forgetting_attn.naive").naive_forgetting_attn

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        rows = (x.transpose(1, 2) for x in (q, k, v, log_decay))
        out = forgetting_attention(*rows, document_ids_BS=None, backend=backend)
        return (out.transpose(1, 2),)

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Results:
        return (peer(q, k, v, log_decay.repeat_interleave(heads[0] // heads[1], dim=2)),)

    return _compare(ours, theirs, _inputs(num_tokens, heads, DIM))


def _retention_backend(num_tokens: int, heads: tuple[int, int], chunk: int) -> Errors:
    """``backend="retention"``, which takes that package's reference on a CPU, and our own."""

    def function(backend: str) -> Callable[..., Results]:
        return lambda q, k, v, log_decay: tuple(
            scan(q, k, v, log_decay, power=2, normalize=True, backend=backend)
        )

    sizes = {"RETENTION_QUADRATIC_TOKENS": 32, "RETENTION_CHUNK_TOKENS": chunk}
    with mock.patch.multiple(scan_backends, **sizes):
        inputs = _inputs(num_tokens, heads, DIM)
        return _compare(function("retention"), function("quadratic"), inputs)


def _fla_backend(heads: tuple[int, int, int], *, documents: bool, state: bool) -> Errors:
    """``backend="fla"`` with its recurrence in place of its kernel, and our own."""
    recurrence = importlib.import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla

    def stand_in(
        *tokens: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> Results:
        if cu_seqlens is None:
            return recurrence(*tokens, scale, initial_state, output_final_state)
        assert all(len(x) == 1 for x in tokens)
        lengths = cu_seqlens.diff().tolist()
        outs, states = [], []
        for i, parts in enumerate(zip(*(x.split(lengths, dim=1) for x in tokens), strict=True)):
            before = None if initial_state is None else initial_state[i : i + 1]
            out, after = recurrence(*parts, scale, before, output_final_state)
            outs.append(out)
            states.append(after)
        return torch.cat(outs, dim=1), torch.cat(states)

    num_q, num_k, num_v = heads
    ids_BS = torch.tensor([[2] * 7 + [0] * 13, [1] * 20]) if documents else None

    def function(backend: str) -> Callable[..., Results]:
        return lambda q, k, v, log_decay, state=None: tuple(
            scan(q, k, v, log_decay, initial_state=state, document_ids_BS=ids_BS, backend=backend)
        )

    inputs = _inputs(20, (num_q, num_k), 24)
    generator = torch.Generator().manual_seed(3)
    inputs["v"] = torch.randn(BATCH, 20, num_v, 24, generator=generator)
    inputs["log_decay"] = -torch.rand(BATCH, 20, num_v, generator=generator)
    if state:
        inputs["state"] = torch.randn(BATCH, num_v, DIM, 24, generator=generator)
    with mock.patch.object(scan_backends, "imported", return_value=stand_in):
        return _compare(function("fla"), function("recurrent"), inputs)


def _backend_cases() -> Iterator[tuple[str, Callable[[], Errors]]]:
    for heads in ((2, 2), (4, 2)):
        for num_tokens, chunk in ((30, 16), (63, 16), (64, 32)):
            name = f"backend retention: {num_tokens} tokens, heads {heads}, chunk {chunk}"
            yield name, functools.partial(_retention_backend, num_tokens, heads, chunk)
    for heads in ((2, 2, 2), (4, 2, 2), (2, 2, 4)):
        for documents in (False, True):
            for state in (False, True):
                options = {"documents": documents, "state": state}
                name = f"backend fla: heads {heads}, {options}"
                yield name, functools.partial(_fla_backend, heads, **options)


def _all_cases() -> Iterator[tuple[str, Callable[[], Errors]]]:
    for backend in ("chunked", "quadratic", "recurrent"):
        for heads in ((2, 2), (4, 2)):
            for num_tokens, chunk in ((2, None), (63, None), (63, 16), (64, 32)):
                name = f"retention: {num_tokens} tokens, heads {heads}, chunk {chunk}, {backend}"
                yield name, functools.partial(_retention, num_tokens, heads, chunk, backend)
        for num_tokens in (1, 63, 100):
            name = f"simple_gla: {num_tokens} tokens, {backend}"
            yield f"parallel {name}", functools.partial(_gla_parallel, num_tokens, backend)
            yield f"recurrent {name}", functools.partial(_gla_recurrent, num_tokens, backend)
    for backend in ("blocked", "reference"):
        for heads in ((2, 2), (4, 2)):
            for num_tokens in (1, 63, 257):
                name = f"forgetting_attn: {num_tokens} tokens, heads {heads}, {backend}"
                yield name, functools.partial(_forgetting, num_tokens, heads, backend)


CASES: dict[str, Callable[[], Errors]] = dict((*_all_cases(), *_backend_cases()))


def main(folder: str) -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            sys.exit(f"{package!r} is not in {folder}; run `make {READY}`")
    for package in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(package) is None, f"{package} must not be importable"
    warnings.filterwarnings("ignore")  # of running on a CPU
    # They print at import, among others to standard output.
    with contextlib.redirect_stdout(sys.stderr):
        results = {name: case() for name, case in CASES.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
