"""Times the Triton kernels on a GPU against whichever peers are installed; finds better tile sizes.

    python -m tools.bench.kernels_gpu --json result.json     correctness gate, then timings
    python -m tools.bench.kernels_gpu --tune                 measure tile sizes, rewrite the table

Correctness first: at 512 tokens every candidate must agree with the fp64 reference, outputs and
gradients; a peer that does not is left out and named, one of ours stops the run. Then candidates
are timed forward and forward + backward over lengths from 2K to 128K tokens; the median counts.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch
from trinity_kernels import tuning
from trinity_kernels.layout import HEAD_DIMS

from tools.bench.kernels_candidates import (
    MAX_TOKENS,
    PEERS,
    SHAPES,
    Candidate,
    Shape,
    as_configured,
    candidates,
    reference_output,
    softmax_attention,
)

LENGTHS = tuple(MAX_TOKENS >> n for n in range(6, -1, -1))
GATE_TOKENS = 512
GATE_TOLERANCE = 3e-2  # bf16 inputs and results, over the largest magnitude
NO_GPU = (
    "this needs a CUDA device, and torch sees none here. Run it on a GPU machine; the kernels' "
    "interpreter tests (pytest tests/kernels) run anywhere."
)


def require_gpu() -> None:
    """Exit with status 2 and a sentence where there is no CUDA device."""
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)


def worst_error(shape: Shape, candidate: Candidate, dtype: torch.dtype) -> float:
    """Largest error of output and gradients over the largest magnitude of each."""
    torch.manual_seed(0)
    own = {name: x.requires_grad_() for name, x in shape.inputs(GATE_TOKENS, dtype).items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in own.items()}
    out, want = candidate.run(own), reference_output(shape.kernel, wide)
    grad = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, list(own.values()), grad))
    want = (want, *torch.autograd.grad(want, list(wide.values()), grad.double()))
    pairs = zip(got, want, strict=True)
    return max(float(((a.double() - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def gate(shape: Shape) -> list[Candidate]:
    """The candidates that agree with the reference; one of ours that does not ends the run."""
    kept = []
    for candidate in candidates(shape):
        if candidate.exact:
            error = worst_error(shape, candidate, torch.bfloat16)
            print(f"{shape.kernel} d={shape.d}: {candidate.name}: error {error:.1e}", flush=True)
            if not error < GATE_TOLERANCE:
                if not candidate.is_peer:
                    raise SystemExit(f"{candidate.name} disagrees with the reference: {error:.1e}")
                continue
        kept.append(candidate)
    return kept


def measure_ms(step: Callable[[], object], *, budget_s: float = 0.3) -> float:
    """Median time of a call on the device: two calls to warm up, then what the budget allows."""
    step()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    torch.cuda.synchronize()
    once_s = max(time.perf_counter() - start_s, 1e-5)
    times_ms = []
    for _ in range(max(3, min(50, int(budget_s / once_s)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return statistics.median(times_ms)


def time_candidate(
    shape: Shape, candidate: Candidate, num_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Rows of the result, with peak memory: forward without autograd, and forward + backward."""
    inputs = {name: x.requires_grad_() for name, x in shape.inputs(num_tokens, dtype).items()}
    leaves = list(inputs.values())
    if candidate.run is softmax_attention:
        leaves = leaves[:3]

    def forward() -> None:
        with torch.no_grad():
            candidate.run(inputs)

    def both() -> None:
        out = candidate.run(inputs)
        torch.autograd.grad(out, leaves, out.detach())

    rows = []
    for direction, step in (("forward", forward), ("forward + backward", both)):
        torch.cuda.reset_peak_memory_stats()
        row = {
            "kernel": shape.kernel, "candidate": candidate.name, "direction": direction,
            "num_tokens": num_tokens, "dtype": str(dtype).removeprefix("torch."),
            "num_heads": shape.num_heads, "num_keys": shape.num_keys, "d": shape.d, "e": shape.e,
            "ms": measure_ms(step),
        }  # fmt: skip
        rows.append({**row, "peak_bytes": torch.cuda.max_memory_allocated()})
    return rows


def crossover(slow_start: dict[int, float], fast_start: dict[int, float]) -> int | None:
    """Tokens from which the first is as fast as the second, between lengths by its logarithm.

    None where it never is; the shortest length where it always is.
    """
    lengths = sorted(slow_start.keys() & fast_start.keys())
    ratio = {n: math.log(slow_start[n] / fast_start[n]) for n in lengths}
    for i, n in enumerate(lengths):
        if all(ratio[m] <= 0 for m in lengths[i:]):
            if i == 0:
                return n
            before = lengths[i - 1]
            share = ratio[before] / (ratio[before] - ratio[n])
            return round(before * (n / before) ** share)
    return None


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each of our kernels overtakes every other candidate of its shape."""
    times: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "num_heads", "d", "e", "direction"))
        of_shape = times.setdefault(key, {})
        of_shape.setdefault(row["candidate"], {})[row["num_tokens"]] = row["ms"]
    found = []
    for (kernel, num_heads, d, e, direction), of_shape in times.items():
        shape = {"kernel": kernel, "num_heads": num_heads, "d": d, "e": e, "direction": direction}
        for name in (name for name in of_shape if name.startswith("trinity")):
            for other in of_shape.keys() - {name}:
                tokens = crossover(of_shape[name], of_shape[other])
                found.append({**shape, "candidate": name, "overtakes": other, "tokens": tokens})
    return found


def environment() -> dict[str, Any]:
    """What a reader must know about numbers: when, on what, with which versions."""
    versions = {}
    for package in ("torch", "triton", *PEERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }


def run_benchmarks(lengths: Iterable[int] = LENGTHS, *, budget_s: float = math.inf) -> dict:
    """Gate and timings; shapes and lengths past the budget are named under ``left_out``."""
    require_gpu()
    end_s = time.monotonic() + budget_s
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    kept = [(shape, gate(shape)) for shape in SHAPES]
    for num_tokens in sorted(lengths):
        for shape, of_shape in kept:
            for candidate in of_shape:
                if num_tokens > candidate.max_tokens:
                    continue
                if time.monotonic() > end_s:
                    left_out.append(f"{shape.kernel} d={shape.d} {candidate.name} {num_tokens}")
                    continue
                rows += time_candidate(shape, candidate, num_tokens)
    return {**environment(), "rows": rows, "crossovers": crossovers(rows), "left_out": left_out}


# Values tried for each size, one size at a time, the rest as they are.
SEARCH: dict[str, dict[str, tuple[int, ...]]] = {
    "first_order": {"chunk": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "second_order": {
        "block": (32, 64, 128),
        "feature_block": (8, 16),
        "state_width": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
        "chunk": (256, 512, 1024, 2048),
    },
    "forgetting_attention": {
        "block_queries": (64, 128),
        "block_keys": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "causal_conv": {
        "block_tokens": (16, 32, 64, 128),
        "block_channels": (32, 64, 128),
        "num_warps": (4, 8),
    },
}
TUNE_TOKENS = 8192


def _tuned_shapes() -> Iterator[tuple[Shape, int]]:
    """Every entry of the table: a shape that uses it, and its head dim."""
    for kernel in SEARCH:
        if kernel == "causal_conv":
            yield Shape(kernel, 0, 4, 0, 3072), tuning.ANY_WIDTH
        else:
            for d in HEAD_DIMS:
                heads = max(4, 1024 // d)
                yield Shape(kernel, heads, d, d, heads), d


def _time_with(shape: Shape, sizes: dict[str, int], num_tokens: int) -> float:
    """Forward + backward with these sizes; infinite where they do not fit the device."""
    from triton.runtime.errors import OutOfResources

    with tuning.override(shape.kernel, **sizes):
        try:
            return time_candidate(shape, as_configured(shape), num_tokens)[-1]["ms"]
        except OutOfResources:
            return math.inf


def _best_sizes(shape: Shape, sizes: dict[str, int]) -> dict[str, int]:
    """One pass over the sizes, each set to the fastest of its values."""
    if "quadratic_below" in sizes:
        sizes = {**sizes, "quadratic_below": 0}  # the chunked form, which has more sizes
    best_ms = _time_with(shape, sizes, TUNE_TOKENS)
    for name, values in SEARCH[shape.kernel].items():
        for value in values:
            trial = {**sizes, name: value}
            if trial != sizes and (trial_ms := _time_with(shape, trial, TUNE_TOKENS)) < best_ms:
                sizes, best_ms = trial, trial_ms
    return sizes


def _quadratic_below(shape: Shape, sizes: dict[str, int]) -> int:
    """Longest row, to within the nearest crossing, for which the quadratic form is faster."""
    times: dict[str, dict[int, float]] = {"chunked": {}, "quadratic": {}}
    for num_tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        for form, threshold in (("chunked", 0), ("quadratic", num_tokens)):
            trial = {**sizes, "quadratic_below": threshold}
            times[form][num_tokens] = _time_with(shape, trial, num_tokens)
    return crossover(times["chunked"], times["quadratic"]) or 32768


def tune(path: Path = tuning.TABLE_PATH) -> None:
    """Measure every entry on this device and write its rows into the table, others untouched."""
    require_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    table = {**tuning.load_table(path)}
    for shape, width in _tuned_shapes():
        sizes = dict(tuning.settings(shape.kernel, width, device))
        sizes = _best_sizes(shape, sizes)
        if shape.kernel == "second_order":
            sizes["quadratic_below"] = _quadratic_below(shape, sizes)
        rows = {**table[shape.kernel]}
        capability = tuning.capability(device)
        rows[capability] = {**rows.get(capability, {}), str(width): sizes}
        table[shape.kernel] = rows
        print(shape.kernel, width, sizes, flush=True)
    name, today = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    table["status"] = f'{capability} measured on {name}, {today}; "any" not yet measured'
    write_table(table, path)


def write_table(table: dict[str, Any], path: Path) -> None:
    """The table with the comment it begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    path.write_text("\n".join([*lines, tomli_w.dumps(table)]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--tune", action="store_true", help="measure and rewrite the tuning table")
    parser.add_argument("--table", type=Path, default=tuning.TABLE_PATH)
    arguments = parser.parse_args()
    require_gpu()
    if arguments.tune:
        tune(arguments.table)
        return
    result = run_benchmarks(arguments.lengths)
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
