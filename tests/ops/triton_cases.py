"""Triton kernels through the contracts of our operations, against the PyTorch backends.

Triton decides at import whether it interprets, so the interpreted cases need a process of their
own: ``TRITON_INTERPRET=1 python -m tests.ops.triton_cases`` prints the errors as JSON. An error is
the largest difference over the largest entry, of each result and each gradient.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import torch
from torch import Tensor

from trinity.ops.attention import forgetting_attention
from trinity.ops.conv import causal_conv
from trinity.ops.scan import scan

Errors = dict[str, float]

NUM_TOKENS, DIM, VALUE_DIM = 40, 16, 32
RETURNING_IDS = [[3] * 9 + [1] * 20 + [3] * 11, [0] * 40]
"""Ids that fall and come back: three documents, then one."""


def _compare(
    function: Callable[..., tuple[Tensor, ...]],
    backends: tuple[str, str],
    shapes: dict[str, tuple[int, ...]],
    device: str,
) -> Errors:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in inputs.keys() & {"log_decay"}:
        inputs[name] = -torch.nn.functional.softplus(inputs[name])
    if "state" in inputs:
        # Sums of weights are positive, and large beside the rounding of what is read.
        inputs["state"] = inputs["state"].abs() + 1.0
    results = []
    for backend in backends:
        leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
        outs = function(**leaves, backend=backend)
        generator.manual_seed(1)
        sent = [torch.randn(x.shape, generator=generator).to(device) for x in outs]
        grads = torch.autograd.grad(outs, list(leaves.values()), sent)
        names = [f"result {i}" for i in range(len(outs))] + [f"gradient of {x}" for x in leaves]
        results.append(dict(zip(names, (*outs, *grads), strict=True)))
    kernel, reference = results
    errors = {}
    for name, expected in reference.items():
        assert kernel[name].shape == expected.shape, name
        difference = (kernel[name] - expected).detach().abs().max()
        errors[name] = float(difference / expected.detach().abs().max())
    return errors


def _scan(
    device: str,
    *,
    power: int,
    normalize: bool = False,
    heads: tuple[int, int, int] = (2, 2, 2),
    documents: bool = False,
    state: bool = False,
    return_state: bool = True,
) -> Errors:
    num_q, num_k, num_v = heads
    features = DIM if power == 1 else DIM * (DIM + 1) // 2
    shapes: dict[str, tuple[int, ...]] = {
        "q": (2, NUM_TOKENS, num_q, DIM),
        "k": (2, NUM_TOKENS, num_k, DIM),
        "v": (2, NUM_TOKENS, num_v, VALUE_DIM),
        "log_decay": (2, NUM_TOKENS, num_v),
    }
    if state:
        shapes["state"] = (2, num_v, features, VALUE_DIM + normalize)
    ids_BS = torch.tensor(RETURNING_IDS, device=device) if documents else None

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        backend: str,
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        out = scan(
            q,
            k,
            v,
            log_decay,
            power=power,
            normalize=normalize,
            document_ids_BS=ids_BS,
            initial_state=state,
            return_state=return_state,
            backend=backend,
        )
        assert (out.state is not None) == return_state
        return tuple(x for x in out if x is not None)

    return _compare(run, ("triton", "quadratic"), shapes, device)


def _forgetting(device: str, *, heads: tuple[int, int], documents: bool) -> Errors:
    num_q, num_k = heads
    ids_BS = torch.tensor(RETURNING_IDS, device=device) if documents else None

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (forgetting_attention(q, k, v, log_decay, document_ids_BS=ids_BS, backend=backend),)

    shapes: dict[str, tuple[int, ...]] = {
        "q": (2, num_q, NUM_TOKENS, DIM),
        "k": (2, num_k, NUM_TOKENS, DIM),
        "v": (2, num_k, NUM_TOKENS, DIM),
        "log_decay": (2, num_k, NUM_TOKENS),
    }
    return _compare(run, ("triton", "reference"), shapes, device)


def _conv(device: str, *, width: int, documents: bool, bias: bool, before: bool) -> Errors:
    num_channels = 20
    ids_BS = torch.tensor(RETURNING_IDS, device=device) if documents else None

    def run(
        x: Tensor,
        weight: Tensor,
        backend: str,
        bias: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        options = {"document_ids_BS": ids_BS, "before_BwC": before, "backend": backend}
        return (causal_conv(x, weight, bias, **options),)

    shapes: dict[str, tuple[int, ...]] = {
        "x": (2, NUM_TOKENS, num_channels),
        "weight": (num_channels, width),
    }
    if bias:
        shapes["bias"] = (num_channels,)
    if before:
        shapes["before"] = (2, width - 1, num_channels)
    return _compare(run, ("triton", "torch"), shapes, device)


CASES: dict[str, Callable[[str], Errors]] = {
    "first order": functools.partial(_scan, power=1),
    "first order, groups, documents, state": functools.partial(
        _scan, power=1, heads=(1, 1, 2), documents=True, state=True
    ),
    "first order, grouped queries": functools.partial(_scan, power=1, heads=(2, 1, 1)),
    "second order": functools.partial(_scan, power=2),
    "second order, divided": functools.partial(_scan, power=2, normalize=True, return_state=False),
    "second order, divided, grouped queries, documents, state": functools.partial(
        _scan, power=2, normalize=True, heads=(2, 1, 1), documents=True, state=True
    ),
    "forgetting": functools.partial(_forgetting, heads=(2, 2), documents=False),
    "forgetting, grouped queries, documents": functools.partial(
        _forgetting, heads=(4, 2), documents=True
    ),
    "convolution": functools.partial(_conv, width=2, documents=False, bias=False, before=False),
    "convolution, documents, tokens before": functools.partial(
        _conv, width=4, documents=True, bias=True, before=True
    ),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: case("cpu") for name, case in CASES.items()}))
