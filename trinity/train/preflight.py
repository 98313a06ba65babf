"""Checks of a job's machines that take seconds and save hours: ``trinity preflight``."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trinity.core import job
from trinity.core.errors import TrainingError

T = TypeVar("T")
UNFIT_STATUS = 2
MAX_CLOCK_OFFSET_S = 1.0
"""Beyond this, logs of nodes cannot be read side by side, and file ages mislead people."""
SLOW_FRACTION = 0.5
"""Of the median; every step waits for the slowest rank."""
MAX_GPU_MEMORY_TAKEN = 0.1
TIMEOUT_S = 120
REPEATS = 3
EXCHANGE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
MATMUL_SIZE = {"cpu": 512, "cuda": 8192}
SHARED_FILE_WAIT_S = 10.0


class Report(NamedTuple):
    """What one rank found."""

    rank: int
    node: str
    versions: str
    num_gpus: int
    gpu_memory_taken: float
    """Fraction of this rank's GPU memory that is in use before the job has allocated any."""
    free_gb: float
    directory_error: str
    sees_shared_file: bool
    sum_is_right: bool
    matmul_tflops: float
    exchange_gb_per_s: float
    """With a rank of another node, both ways at once; the better one of two partners."""
    all_reduce_gb_per_s: float
    clock_offset_s: float
    """Its node's clock minus rank 0's."""
    clock_error_s: float
    """The offset may be wrong by this much: half the fastest round trip."""


def preflight_command(directory: Path, *, min_free_gb: float, device: str) -> int:
    """Check every rank and print the table on the first; returns the exit status.

    Raises TrainingError when not all ranks answer.
    """
    try:
        with job.joined(device, timeout_s=TIMEOUT_S) as own:
            reports = gather(examine(directory, own))
            problems = find_problems(reports, min_free_gb=min_free_gb)
            if job.is_first():
                show(reports, problems, find_slow(reports))
    except dist.DistError as error:
        raise TrainingError(
            f"rank {os.environ.get('RANK', '?')} on {_node()}: not all ranks answered within "
            f"{TIMEOUT_S} s: {str(error).splitlines()[0]}; look for a node that is missing above, "
            "and whether GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name a network that all share"
        ) from None
    return UNFIT_STATUS if problems else 0


def examine(directory: Path, device: torch.device) -> Report:
    """Everything that a rank can measure, together with the others."""
    nodes = gather(_node())
    free_gb, directory_error = _free_space(directory)
    offset_s, error_s = _clock_offset(nodes)
    return Report(
        rank=job.rank(),
        node=_node(),
        versions=_versions(device),
        num_gpus=torch.cuda.device_count(),
        gpu_memory_taken=_gpu_memory_taken(device),
        free_gb=free_gb,
        directory_error=directory_error,
        sees_shared_file=_sees_shared_file(directory),
        sum_is_right=_sum_is_right(device),
        matmul_tflops=_matmul_speed(device),
        exchange_gb_per_s=_exchange_speed(nodes, device),
        all_reduce_gb_per_s=_all_reduce_speed(device),
        clock_offset_s=offset_s,
        clock_error_s=error_s,
    )


def gather(value: T) -> list[T]:
    """The values of all ranks."""
    if job.world_size() == 1:
        return [value]
    values: list[T | None] = [None] * job.world_size()
    dist.all_gather_object(values, value)
    return [v for v in values if v is not None]


def find_problems(reports: list[Report], *, min_free_gb: float) -> list[str]:
    """What is wrong and what to do about it, a line each; empty when the job may start."""
    problems = _differences(reports)
    for report in reports:
        where = f"rank {report.rank} on {report.node}"
        if report.directory_error:
            problems.append(
                f"{where} cannot use the output directory: {report.directory_error}; mount it or "
                "choose another"
            )
        elif report.free_gb < min_free_gb:
            problems.append(
                f"{where}: {report.free_gb:.1f} GB free in the output directory, wanted "
                f"{min_free_gb:g}; free space or choose another directory"
            )
        elif not report.sees_shared_file:
            problems.append(
                f"{where} does not see what rank 0 writes in the output directory; it must be on a "
                "file system that all nodes share"
            )
        if not report.sum_is_right:
            problems.append(f"{where}: an all-reduce gave a wrong sum; take the node out")
        if report.gpu_memory_taken > MAX_GPU_MEMORY_TAKEN:
            problems.append(
                f"{where}: {report.gpu_memory_taken:.0%} of its GPU's memory is in use already; "
                "end the process that holds it"
            )
        if abs(report.clock_offset_s) - report.clock_error_s > MAX_CLOCK_OFFSET_S:
            problems.append(
                f"{where}: its clock is {report.clock_offset_s:+.1f} s off rank 0's; synchronise "
                "them"
            )
    return problems


def _differences(reports: list[Report]) -> list[str]:
    """What should be the same on all nodes and is not."""
    ranks_on = _by_node(reports)
    problems = []
    for what, of_report, remedy in (
        ("versions", lambda r: r.versions, "install the same everywhere"),
        ("numbers of GPUs", lambda r: r.num_gpus, "take the node out"),
        ("numbers of ranks", lambda r: len(ranks_on[r.node]), "start as many on every node"),
    ):
        values = {of_report(report): report for report in reversed(reports)}
        if len(values) > 1:
            told = "; ".join(f"rank {r.rank} on {r.node}: {v}" for v, r in values.items())
            problems.append(f"{what} differ ({told}); {remedy}")
    return problems


def find_slow(reports: list[Report]) -> list[str]:
    """Nodes that compute or communicate at less than half the speed of the others."""
    nodes = _by_node(reports)
    slow = []
    for what, unit, of_report in (
        ("matrix product", "TFLOP/s", lambda r: r.matmul_tflops),
        ("exchange with other nodes", "GB/s", lambda r: r.exchange_gb_per_s),
    ):
        slowest = {node: min(of_report(r) for r in own) for node, own in nodes.items()}
        median = statistics.median(slowest.values())
        slow += [
            f"{node}: {what} at {speed:.3g} {unit}, the median node has {median:.3g}"
            for node, speed in slowest.items()
            if speed < SLOW_FRACTION * median
        ]
    return slow


def show(reports: list[Report], problems: list[str], slow: list[str]) -> None:
    """Print a row per node, then what is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    nodes = _by_node(reports)
    table = Table(title=f"preflight: {len(reports)} ranks on {len(nodes)} nodes")
    headings = ("node", "ranks", "GPUs", "free GB", "TFLOP/s", "exchange GB/s", "clock offset s")
    for heading in headings:
        table.add_column(heading, justify="right")
    for node, own in nodes.items():
        table.add_row(
            node,
            f"{own[0].rank}-{own[-1].rank}" if len(own) > 1 else str(own[0].rank),
            str(own[0].num_gpus),
            f"{min(r.free_gb for r in own):.1f}",
            f"{min(r.matmul_tflops for r in own):.3g}",
            f"{min(r.exchange_gb_per_s for r in own):.3g}",
            f"{own[0].clock_offset_s:+.4f} ± {own[0].clock_error_s:.4f}",
        )
    console.print(table, soft_wrap=False)
    for versions in sorted({report.versions for report in reports}):
        console.print(versions, markup=False)
    if len(reports) > 1:
        slowest = min(reports, key=lambda report: report.exchange_gb_per_s)
        speed = min(report.all_reduce_gb_per_s for report in reports)
        console.print(f"all-reduce: {speed:.3g} GB/s per rank (bus bandwidth)", markup=False)
        console.print(f"slowest exchange: rank {slowest.rank} on {slowest.node}", markup=False)
    for line in slow:
        console.print(f"warning: slow node {line}", markup=False)
    for problem in problems:
        Console(stderr=True, soft_wrap=True).print(f"problem: {problem}", markup=False)
    console.print("unfit" if problems else "fit", markup=False)
    sys.stdout.flush()


def _by_node(reports: list[Report]) -> dict[str, list[Report]]:
    nodes: dict[str, list[Report]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report)
    return nodes


def _node() -> str:
    """Slurm's name of this machine, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _versions(device: torch.device) -> str:
    text = (
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"trinity {version('trinity-pretrain')}"
    )
    if device.type == "cuda":
        text += f", CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    return text


def _gpu_memory_taken(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def _free_space(directory: Path) -> tuple[float, str]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free / 1e9, ""
    except OSError as error:
        return 0.0, str(error)


def _sees_shared_file(directory: Path) -> bool:
    path = directory / f"preflight-{uuid.uuid4().hex}"
    written = True
    if job.is_first():
        try:
            path.write_text("", encoding="utf-8")
        except OSError as error:
            written = False
            print(f"{path}: {error}", file=sys.stderr)
    path, written = job.from_first((path, written))
    if not written:
        return False
    deadline_s = time.monotonic() + SHARED_FILE_WAIT_S  # network file systems may take a moment
    while not (seen := path.exists()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    job.barrier()
    if job.is_first():
        path.unlink(missing_ok=True)
    return seen


def _sum_is_right(device: torch.device) -> bool:
    size = job.world_size()
    if size == 1:
        return True
    values = torch.arange(1000, device=device, dtype=torch.float32) + job.rank()
    dist.all_reduce(values)
    expected = size * torch.arange(1000, dtype=torch.float32) + size * (size - 1) / 2
    return torch.equal(values.cpu(), expected)


def _fastest_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run of a collective or local piece of work; ranks start together."""
    durations_s = []
    for _ in range(REPEATS + 1):  # the first one connects and warms up
        job.barrier()
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s[1:])


def _matmul_speed(device: torch.device) -> float:
    """TFLOP/s of one matrix product."""
    size = MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _fastest_s(lambda: a @ a, device) / 1e12


def _all_reduce_speed(device: torch.device) -> float:
    """Bus bandwidth: GB/s that a ring all-reduce sends from every rank."""
    size = job.world_size()
    if size == 1:
        return float("inf")
    values = torch.zeros(EXCHANGE_BYTES[device.type] // 4, device=device)
    duration_s = _fastest_s(lambda: dist.all_reduce(values), device)
    return 2 * (size - 1) / size * values.nbytes / duration_s / 1e9


def partners(position: int, count: int) -> list[int]:
    """Whom to exchange with, in two rounds of disjoint pairs around a ring; -1: nobody.

    A node beside a slow one has a healthy partner in the other round; only the slow one is slow in
    both. Two nodes alone cannot be told apart.
    """
    even = position ^ 1
    odd = (position + 1) % count if position % 2 else (position - 1) % count
    paired = odd != position and (odd % 2 != position % 2)
    return [even if even < count else -1, odd if paired else -1]


def _exchange_speed(nodes: list[str], device: torch.device) -> float:
    """GB/s sent to a rank of another node (with one node: another rank) while receiving as much."""
    if job.world_size() == 1:
        return float("inf")
    ranks_per_node = nodes.count(nodes[0])
    stride = ranks_per_node if nodes.count(nodes[-1]) == ranks_per_node < len(nodes) else 1
    position, lane = divmod(job.rank(), stride)
    outgoing = torch.ones(EXCHANGE_BYTES[device.type] // 4, device=device)
    incoming = torch.empty_like(outgoing)
    speed = 0.0
    for partner in partners(position, len(nodes) // stride):
        other = partner * stride + lane

        def exchange(other: int = other, paired: bool = partner >= 0) -> None:
            if paired:
                both = [
                    dist.P2POp(dist.isend, outgoing, other),
                    dist.P2POp(dist.irecv, incoming, other),
                ]
                for request in dist.batch_isend_irecv(both):
                    request.wait()

        duration_s = _fastest_s(exchange, device)
        if partner >= 0:
            speed = max(speed, outgoing.nbytes / duration_s / 1e9)
    return speed


def _clock_offset(nodes: list[str]) -> tuple[float, float]:
    """This node's clock minus rank 0's, and how wrong that may be, in seconds.

    One rank of each node answers pings of rank 0, over gloo: NCCL would only queue them.
    """
    speakers = [nodes.index(node) for node in dict.fromkeys(nodes)]
    found = {0: (0.0, 0.0)}
    if len(speakers) > 1:
        group = dist.new_group(speakers, backend="gloo")
        if isinstance(group, dist.ProcessGroup):
            for other in speakers[1:]:
                found[other] = _ping(other, group)
    return job.from_first(found)[nodes.index(_node())]


def _ping(other: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """What rank 0 learns of another rank's clock; all of the group call it."""
    stamp = torch.zeros(1, dtype=torch.float64)
    pings = [(float("inf"), 0.0)]
    for _ in range(REPEATS):
        if job.is_first():
            before_s = time.time()
            dist.send(stamp, other, group=group)
            dist.recv(stamp, other, group=group)
            error_s = (time.time() - before_s) / 2
            pings.append((error_s, float(stamp) - before_s - error_s))
        elif job.rank() == other:
            dist.recv(stamp, 0, group=group)
            dist.send(stamp.fill_(time.time()), 0, group=group)
    error_s, offset_s = min(pings)
    return offset_s, error_s
