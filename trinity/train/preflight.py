"""Checks of a job's machines that take seconds and save hours: ``trinity preflight``."""

from __future__ import annotations

import platform
import shutil
import socket
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trinity.core import job
from trinity.core.errors import ConfigError

UNFIT_STATUS = 2
MAX_CLOCK_SKEW_S = 1.0
"""Beyond this, logs of nodes cannot be read side by side, and file ages mislead watchdogs."""
TIMEOUT_S = 120
EXCHANGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


class Report(NamedTuple):
    """What one rank found."""

    rank: int
    node: str
    versions: str
    num_gpus: int
    free_gb: float
    sees_shared_file: bool
    sum_is_right: bool
    exchange_gb_per_s: float
    """With the next rank, both ways at once."""
    clock_skew_s: float
    """Against rank 0, without what the round trip leaves open."""


def preflight_command(directory: Path, *, min_free_gb: float, device: str) -> int:
    """Check every rank and print the table on the first; returns the exit status."""
    with job.joined(device, timeout_s=TIMEOUT_S) as own:
        report = examine(directory, own)
        reports = gather(report)
        problems = find_problems(reports, min_free_gb=min_free_gb)
        if job.is_first():
            _show(reports, problems)
    return UNFIT_STATUS if problems else 0


def examine(directory: Path, device: torch.device) -> Report:
    """Everything that a rank can measure, together with the others."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free_gb = shutil.disk_usage(directory).free / 1e9
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be used: {error}") from None
    return Report(
        rank=job.rank(),
        node=socket.gethostname(),
        versions=f"python {platform.python_version()}, torch {torch.__version__}, "
        f"trinity {version('trinity-pretrain')}",
        num_gpus=torch.cuda.device_count(),
        free_gb=free_gb,
        sees_shared_file=_sees_shared_file(directory),
        sum_is_right=_sum_is_right(device),
        exchange_gb_per_s=_exchange_speed(device),
        clock_skew_s=_clock_skew(device),
    )


def gather(report: Report) -> list[Report]:
    """The reports of all ranks."""
    if job.world_size() == 1:
        return [report]
    reports: list[Report | None] = [None] * job.world_size()
    dist.all_gather_object(reports, report)
    return [r for r in reports if r is not None]


def find_problems(reports: list[Report], *, min_free_gb: float) -> list[str]:
    """What is wrong and what to do about it, a line each; empty when the job may start."""
    problems = []
    for name in ("versions", "num_gpus"):
        values = {getattr(report, name): report for report in reports}
        if len(values) > 1:
            told = "; ".join(f"rank {r.rank} on {r.node}: {value}" for value, r in values.items())
            problems.append(f"{name} differ ({told}); install the same everywhere")
    for report in reports:
        where = f"rank {report.rank} on {report.node}"
        if report.free_gb < min_free_gb:
            problems.append(
                f"{where}: {report.free_gb:.1f} GB free in the output directory, wanted "
                f"{min_free_gb:g}; free space or choose another directory"
            )
        if not report.sees_shared_file:
            problems.append(
                f"{where} does not see what rank 0 writes in the output directory; it must be on a "
                "file system that all nodes share"
            )
        if not report.sum_is_right:
            problems.append(f"{where}: an all-reduce gave a wrong sum; take the node out")
        if report.clock_skew_s > MAX_CLOCK_SKEW_S:
            problems.append(
                f"{where}: its clock is {report.clock_skew_s:.1f} s off rank 0's; synchronise them"
            )
    return problems


def _sees_shared_file(directory: Path) -> bool:
    name = job.from_first(f"preflight-{uuid.uuid4().hex}")
    path = directory / name
    if job.is_first():
        path.write_text(name, encoding="utf-8")
    job.barrier()
    deadline_s = time.monotonic() + 10  # network file systems may take a moment
    seen = path.exists()
    while not seen and time.monotonic() < deadline_s:
        time.sleep(0.2)
        seen = path.exists()
    job.barrier()
    if job.is_first():
        path.unlink()
    return seen


def _sum_is_right(device: torch.device) -> bool:
    if job.world_size() == 1:
        return True
    values = torch.arange(1000, device=device, dtype=torch.float32) + job.rank()
    dist.all_reduce(values)
    size = job.world_size()
    expected = size * torch.arange(1000, dtype=torch.float32) + size * (size - 1) / 2
    return torch.equal(values.cpu(), expected)


def _exchange_speed(device: torch.device) -> float:
    """GB/s sent to the next rank while receiving as much from the previous one."""
    rank, size = job.rank(), job.world_size()
    if size == 1:
        return float("inf")
    outgoing = torch.ones(EXCHANGE_BYTES[device.type] // 4, device=device)
    incoming = torch.empty_like(outgoing)
    durations_s = []
    for _ in range(3):
        job.barrier()
        start_s = time.perf_counter()
        for request in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, (rank + 1) % size),
                dist.P2POp(dist.irecv, incoming, (rank - 1) % size),
            ]
        ):
            request.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations_s.append(time.perf_counter() - start_s)
    return outgoing.nbytes / min(durations_s) / 1e9


def _clock_skew(device: torch.device) -> float:
    """Seconds by which the clock surely differs from rank 0's: half the round trip is open."""
    skew_s = 0.0
    for other in range(1, job.world_size()):
        if job.is_first():
            before_s = time.time()
            theirs = torch.zeros(1, dtype=torch.float64, device=device)
            dist.send(theirs, other)
            dist.recv(theirs, other)
            after_s = time.time()
            bounds = torch.tensor([before_s, after_s], dtype=torch.float64, device=device)
            dist.send(bounds, other)
        elif job.rank() == other:
            ping = torch.zeros(1, dtype=torch.float64, device=device)
            dist.recv(ping, 0)
            own_s = time.time()
            dist.send(torch.tensor([own_s], dtype=torch.float64, device=device), 0)
            bounds = torch.zeros(2, dtype=torch.float64, device=device)
            dist.recv(bounds, 0)
            before_s, after_s = bounds.tolist()
            skew_s = max(0.0, before_s - own_s, own_s - after_s)
    return skew_s


def _show(reports: list[Report], problems: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    nodes = {report.node for report in reports}
    slowest = min(reports, key=lambda report: report.exchange_gb_per_s)
    table = Table(title=f"preflight: {len(reports)} ranks on {len(nodes)} nodes")
    for heading in ("node", "ranks", "GPUs", "free GB", "slowest exchange GB/s", "clock skew s"):
        table.add_column(heading, justify="right")
    for node in sorted(nodes):
        own = [report for report in reports if report.node == node]
        table.add_row(
            node,
            str(len(own)),
            str(own[0].num_gpus),
            f"{min(r.free_gb for r in own):.1f}",
            f"{min(r.exchange_gb_per_s for r in own):.2f}",
            f"{max(r.clock_skew_s for r in own):.3f}",
        )
    console.print(table, soft_wrap=False)
    if len(reports) > 1:
        console.print(f"slowest exchange: rank {slowest.rank} on {slowest.node}", markup=False)
    for problem in problems:
        Console(stderr=True, soft_wrap=True).print(f"problem: {problem}", markup=False)
    console.print("fit" if not problems else f"{len(problems)} problems", markup=False)
    sys.stdout.flush()
