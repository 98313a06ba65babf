"""Compiles kernels for a GPU that is not there, as far as a program for the device.

The interpreter accepts what the compiler refuses (a variable that changes its type in a loop, a
tile that does not fit). Triton brings NVIDIA's assembler along, so compiling needs no driver:
launches are caught, compiled for compute capability 9.0 and not run; results stay empty.

    python -m tests.kernels.compiling bfloat16 64 64
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

CAPABILITY = 90
MAX_SHARED_BYTES = 227 * 1024
"""Shared memory that one block may have on compute capability 9.0."""

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


class Compiled(NamedTuple):
    """What one launch asks of the device."""

    kernel: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    """Local memory per thread: what registers spill into."""


def _source(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        # The launcher, too, makes a constant of an integer that is 1.
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            hints[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                hints[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as the disassembler reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Inside, launches on CPU tensors compile and return; the list tells what they compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    launches: list[Compiled] = []
    done: dict[str, Compiled] = {}

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        source = _source(kernel, arguments)
        launch = {key: options[key] for key in LAUNCH_OPTIONS if key in options}
        assert launch.keys() == options.keys(), options
        key = f"{source.hash()}{launch}"
        if key not in done:
            program = triton.compile(
                source, target=GPUTarget("cuda", CAPABILITY, 32), options=launch
            )
            usage = _resources(program.asm["cubin"])
            done[key] = Compiled(kernel.__name__, program.metadata.shared, *usage)
            launches.append(done[key])

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("trinity_kernels.api.interpreting", return_value=True),
    ):
        yield launches


def compile_kernels(d: int, e: int, dtype: torch.dtype) -> list[Compiled]:
    """Forward and backward of every kernel, with documents and the sizes of the tuning table."""
    import trinity_kernels as kernels

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    def tokens() -> tuple[torch.Tensor, ...]:
        decay = torch.zeros(1, 256, 2, requires_grad=True)
        return normal(1, 256, 2, d), normal(1, 256, 2, d), normal(1, 256, 2, e), decay

    shared = {"scale": 1.0, "document_ids_BS": torch.zeros(1, 256, dtype=torch.int32)}
    with compiling() as launches:
        for scan in (kernels.first_order_scan, kernels.second_order_scan):
            chunk = {"chunk_size": 128} if scan is kernels.second_order_scan else {}
            out, final = scan(*tokens(), **shared, **chunk)
            (out.sum() + final.sum()).backward()
        kernels.forgetting_attention(*tokens(), **shared).sum().backward()
        x, weight = normal(1, 256, 64), normal(64, 4)
        kernels.causal_conv(x, weight, activation="silu").sum().backward()
    return launches


def main(dtype: str, d: str, e: str) -> None:
    """Compile everything for one dtype and width; prints what each launch costs as JSON."""
    launches = compile_kernels(int(d), int(e), getattr(torch, dtype))
    for launch in launches:
        print(launch, file=sys.stderr)
    print(json.dumps([launch._asdict() for launch in launches]))


if __name__ == "__main__":
    main(*sys.argv[1:])
