"""Cases that compare a kernel with its reference: the same ones interpreted here and on a GPU.

Triton decides at import whether it interprets, for the whole process, so interpreted cases run in a
process of their own: ``python -m tests.kernels.harness first_order`` prints the errors as JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300

# Largest error over the largest magnitude of the reference, fp64 on the same rounded inputs.
# fp32 uses "ieee" products, the 16-bit types tf32 ones and results rounded to 16 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Errors = dict[str, float]


class Maker:
    """Seeded inputs on one device; the same numbers whatever the device and dtype."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Unit normal numbers."""
        x = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return x.to(self.device, dtype or self.dtype)

    def log_decay(self, *shape: int, bias: float = 0.0) -> Tensor:
        """-softplus of a normal number plus ``bias``, fp32 as in the layers."""
        x = self.normal(*shape, dtype=torch.float32)
        return -torch.nn.functional.softplus(x + bias)

    def documents(self, rows: list[list[int]], num_tokens: int) -> Tensor:
        """Document ids from the first tokens of all documents but the first, row by row."""
        ids = torch.zeros(len(rows), num_tokens, dtype=torch.int32)
        for row, starts in enumerate(rows):
            for start in starts:
                ids[row, start:] += 1
        return ids.to(self.device)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where the result is not finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    scale = want.abs().max().clamp_min(1e-3)
    return float((got.double() - want.double()).abs().max() / scale)


def compare(
    kernel: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    leaves: dict[str, Tensor],
) -> Errors:
    """Errors of every result and of the gradient of every leaf, against the reference in fp64.

    All results get a random gradient each, so gradients that arrive at a final state count too.
    """
    own = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    got, want = kernel(**own), reference(**wide)
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in got]
    errors = {}
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        errors[f"result {i}"] = relative_error(a.detach(), b.detach())
    own_grads = torch.autograd.grad(got, list(own.values()), grads)
    wide_grads = torch.autograd.grad(want, list(wide.values()), [g.double() for g in grads])
    for (name, leaf), a, b in zip(own.items(), own_grads, wide_grads, strict=True):
        assert a.dtype == leaf.dtype
        errors[f"gradient of {name}"] = relative_error(a, b)
    return errors


def cases_of(module: str) -> dict[str, Callable[[torch.device, torch.dtype], Errors]]:
    """The cases of ``tests/kernels/<module>_cases.py``."""
    return importlib.import_module(f"tests.kernels.{module}_cases").CASES


@functools.cache
def interpreted(module: str, dtype: str = "float32", *names: str) -> dict[str, Errors]:
    """Errors of the named cases of a module, or all, from one interpreting process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.harness", module, dtype, *names],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cut_operands() -> None:
    """Make the interpreter's tf32 products drop 13 bits of their operands, as a device does."""
    from triton.runtime import interpreter

    exact_dot = interpreter.InterpreterBuilder.create_dot

    def cut(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if operand.data.dtype != numpy.float32:
            return operand
        bits = numpy.ascontiguousarray(operand.data).view(numpy.uint32) & numpy.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(numpy.float32), operand.dtype)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, max_num_imprecise: Any) -> Any:
        if "TF32" in str(precision):
            a, b = cut(a), cut(b)
        return exact_dot(self, a, b, d, precision, max_num_imprecise)

    setattr(interpreter.InterpreterBuilder, "create_dot", dot)  # noqa: B010


def assert_small(errors: Errors, dtype: torch.dtype) -> None:
    """Every error below the tolerance of the dtype."""
    assert errors
    large = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not large, large


def main(module: str, dtype: str = "float32", *names: str) -> None:
    """Run cases on the CPU, all unless named; prints JSON, and a line per case on stderr."""
    if dtype != "float32":
        cut_operands()
    results = {}
    for name, case in cases_of(module).items():
        if not names or name in names:
            start_s = time.perf_counter()
            results[name] = case(torch.device("cpu"), getattr(torch, dtype))
            worst = max(results[name], key=lambda key: results[name][key])
            took_s = time.perf_counter() - start_s
            print(f"{name}: {results[name][worst]:.1e} ({worst}), {took_s:.1f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
