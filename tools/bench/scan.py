"""Scans on a CPU: against transformers' Mamba-2, against attention, and their growth with length.

Correctness first: outputs and gradients must agree with transformers' or with the recurrence before
anything is timed. Then the candidates take turns in one process, by process CPU time, which other
work on the machine hardly disturbs; the minimum counts. All numbers are forward and backward, fp32.

    python tools/bench/scan.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from trinity.core.model_config import ModelConfig
from trinity.nn.linear_mixer import LinearMixer
from trinity.ops import squared_scan
from trinity.ops.scan import scan

RESULTS = Path(__file__).parent / "results" / "scan.json"
LARGEST_ERROR = 1e-4

HEADS, HEAD_DIM, STATE_DIM = 8, 64, 128
FIRST_ORDER_TOKENS = (512, 2048, 8192)
PEER_CHUNKS = (64, 128, 256)
"""The last is the peer's default."""
LAYER_TOKENS = (4096, 8192)
CROSSOVER_TOKENS = {32: (256, 512, 1024, 2048), 64: (512, 1024, 2048, 4096)}
CROSSOVER_HEADS = 4

Step = Callable[[], list[Tensor]]
"""A forward and a backward; returns the output and the gradients."""


def race(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Least CPU milliseconds of each, taking turns after one step to warm up."""
    for step in steps.values():
        step()
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start_s = time.process_time()
            step()
            best[name] = min(best[name], (time.process_time() - start_s) * 1e3)
    return best


def worst_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over the largest entry, of the output and of each gradient."""
    pairs = zip(ours, theirs, strict=True)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if not worst < LARGEST_ERROR:
        raise SystemExit(f"not timed: results differ by {worst:.1e}")
    return worst


def step_of(
    function: Callable[..., Tensor], leaves: dict[str, Tensor], generator: torch.Generator
) -> Step:
    """``function`` of the leaves and its gradients from a fixed random one."""
    with torch.no_grad():
        sent = torch.randn(function(**leaves).shape, generator=generator)

    def step() -> list[Tensor]:
        out = function(**leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), sent)]

    return step


def leaves_of(generator: torch.Generator, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Unit normal inputs that take gradients."""
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def first_order(num_tokens: int, rounds: int) -> dict[str, Any]:
    """The core of Mamba-2 against transformers' and against attention of the same width."""
    generator = torch.Generator().manual_seed(0)
    leaves = leaves_of(
        generator,
        q=(1, num_tokens, 1, STATE_DIM),
        k=(1, num_tokens, 1, STATE_DIM),
        x=(1, num_tokens, HEADS, HEAD_DIM),
        dt=(1, num_tokens, HEADS),
    )
    # Steps and rates as Mamba-2 initialises them: 0.001 to 0.1, and 1 to 16.
    leaves["dt"] = (torch.rand(1, num_tokens, HEADS, generator=generator) * 0.1).requires_grad_()
    rate_U = -torch.linspace(1, 16, HEADS)

    def ours(q: Tensor, k: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        v = x * dt.unsqueeze(-1)
        return scan(q, k, v, rate_U * dt, scale=1.0, return_state=False, backend="chunked").out_BSHe

    def theirs(chunk: int) -> Step:
        def function(q: Tensor, k: Tensor, x: Tensor, dt: Tensor) -> Tensor:
            out = mamba2_chunk_scan(x, dt, rate_U, k, q, chunk)
            assert isinstance(out, Tensor)
            return out

        return step_of(function, leaves, torch.Generator().manual_seed(1))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    heads = leaves_of(
        torch.Generator().manual_seed(2),
        **dict.fromkeys("qkv", (1, HEADS, num_tokens, HEAD_DIM)),
    )
    steps = {"ours": step_of(ours, leaves, torch.Generator().manual_seed(1))}
    steps |= {f"transformers, chunk {chunk}": theirs(chunk) for chunk in PEER_CHUNKS}
    steps["attention"] = step_of(attention, heads, torch.Generator().manual_seed(1))
    default = f"transformers, chunk {PEER_CHUNKS[-1]}"
    error = worst_error(steps["ours"](), steps[default]())
    cpu_ms = race(steps, rounds)
    peers = [ms for name, ms in cpu_ms.items() if name.startswith("transformers")]
    return {
        "tokens": num_tokens,
        "error": error,
        "cpu_ms": {name: round(ms, 1) for name, ms in cpu_ms.items()},
        "vs_default": round(cpu_ms[default] / cpu_ms["ours"], 2),
        "vs_best": round(min(peers) / cpu_ms["ours"], 2),
        "vs_attention": round(cpu_ms["attention"] / cpu_ms["ours"], 2),
    }


def layer_growth(rounds: int) -> dict[str, Any]:
    """A 2Mamba layer, 256 wide: what twice the tokens cost, in chunks and as it chooses itself."""
    config = ModelConfig.model_validate(
        {
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_dense_layers": 1,
            "layer_types": ["2mamba"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "route_scale": 1.0,
            "sliding_window": 64,
            "max_position_embeddings": max(LAYER_TOKENS),
        }
    )
    generator = torch.Generator().manual_seed(0)
    layer = LinearMixer(config, "2mamba")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    parameters = list(layer.parameters())

    def step_at(num_tokens: int) -> Step:
        x_BSD = torch.randn(1, num_tokens, 256, generator=generator)
        sent_BSD = torch.randn(1, num_tokens, 256, generator=generator)

        def step() -> list[Tensor]:
            out = layer(x_BSD)
            return [out.detach(), *torch.autograd.grad(out, parameters, sent_BSD)]

        return step

    error = _layer_error(layer, step_at(300))
    cpu_ms = race({str(n): step_at(n) for n in LAYER_TOKENS}, rounds)
    short, long = (cpu_ms[str(n)] for n in LAYER_TOKENS)
    return {
        "error": error,
        "cpu_ms": {name: round(ms) for name, ms in cpu_ms.items()},
        "growth": round(long / short, 2),
    }


def _layer_error(layer: LinearMixer, step: Step) -> float:
    """The layer in chunks against itself token by token."""
    layer.backend = "recurrent"
    expected = step()
    layer.backend = "auto"
    forced = dict.fromkeys(squared_scan.QUADRATIC_TOKENS, 0)
    usual, squared_scan.QUADRATIC_TOKENS = squared_scan.QUADRATIC_TOKENS, forced
    try:
        return worst_error(step(), expected)
    finally:
        squared_scan.QUADRATIC_TOKENS = usual


def crossover(dim: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """The normalised scan of second order: all weights of a row formed, or in chunks."""
    shape = (1, num_tokens, CROSSOVER_HEADS, dim)
    leaves = leaves_of(torch.Generator().manual_seed(0), q=shape, k=shape, v=shape)
    log_decay_BSU = -torch.rand(shape[:3], generator=torch.Generator().manual_seed(1))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"power": 2, "normalize": True, "return_state": False, "backend": "chunked"}
        return scan(q, k, v, log_decay_BSU, **options).out_BSHe

    usual = squared_scan.QUADRATIC_TOKENS

    def forced(limit: int) -> Step:
        inner = step_of(function, leaves, torch.Generator().manual_seed(2))

        def step() -> list[Tensor]:
            squared_scan.QUADRATIC_TOKENS = dict.fromkeys(usual, limit)
            try:
                return inner()
            finally:
                squared_scan.QUADRATIC_TOKENS = usual

        return step

    steps = {"quadratic": forced(num_tokens), "chunked": forced(0)}
    # Rows whose weights nearly vanish have gradients as large as they are uncertain.
    out, expected = (step()[0] for step in steps.values())
    error = worst_error([out], [expected])
    cpu_ms = race(steps, rounds)
    return {
        "width": dim,
        "tokens": num_tokens,
        "error": error,
        "cpu_ms": {name: round(ms, 1) for name, ms in cpu_ms.items()},
        "quadratic_over_chunked": round(cpu_ms["quadratic"] / cpu_ms["chunked"], 2),
        "chosen": "quadratic" if num_tokens <= squared_scan.quadratic_tokens(dim) else "chunked",
    }


def show(console: Console, record: dict[str, Any]) -> None:
    """Three tables."""
    table = Table(title=f"first order, {HEADS} heads x {HEAD_DIM}, state {STATE_DIM}: CPU ms")
    names = list(record["first_order"][0]["cpu_ms"])
    for heading in ("tokens", *names, "vs default", "vs best", "vs attention", "error"):
        table.add_column(heading)
    for row in record["first_order"]:
        times = [str(row["cpu_ms"][name]) for name in names]
        ratios = [f"{row[key]}x" for key in ("vs_default", "vs_best", "vs_attention")]
        table.add_row(str(row["tokens"]), *times, *ratios, f"{row['error']:.0e}")
    console.print(table)
    layer = record["layer"]
    times = ", ".join(f"{ms} ms at {n} tokens" for n, ms in layer["cpu_ms"].items())
    console.print(
        f"2Mamba layer, forward and backward: {times}: {layer['growth']}x "
        f"(error {layer['error']:.0e})"
    )
    table = Table(title=f"second order, {CROSSOVER_HEADS} heads: CPU ms")
    for heading in ("width", "tokens", "quadratic", "chunked", "ratio", "chosen", "error"):
        table.add_column(heading)
    for row in record["crossover"]:
        times = [str(row["cpu_ms"][name]) for name in ("quadratic", "chunked")]
        rest = [f"{row['quadratic_over_chunked']}x", row["chosen"], f"{row['error']:.0e}"]
        table.add_row(str(row["width"]), str(row["tokens"]), *times, *rest)
    console.print(table)


def main() -> None:
    """Measure, print, and with --save write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "benchmark": "scan",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "first_order": [first_order(n, arguments.rounds) for n in FIRST_ORDER_TOKENS],
        "layer": layer_growth(arguments.rounds),
        "crossover": [
            crossover(dim, n, arguments.rounds)
            for dim, lengths in CROSSOVER_TOKENS.items()
            for n in lengths
        ],
    }
    show(Console(width=140), record)
    if arguments.save:
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
