"""``trinity doctor``: what this machine and this environment offer."""

from __future__ import annotations

import platform
from importlib.metadata import version

import psutil
import torch
from rich.console import Console
from rich.table import Table

from trinity.core.runtime import choose_device, optional_backends


def report() -> None:
    """Print versions, devices and optional packages to standard output."""
    console = Console(highlight=False)
    facts = Table(title="environment", show_header=False)
    memory_gib = psutil.virtual_memory().total / 2**30
    for name, value in (
        ("trinity", version("trinity-pretrain")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("platform", platform.platform()),
        (
            "cpu",
            f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, "
            f"{torch.get_num_threads()} torch threads, {memory_gib:.0f} GiB memory",
        ),
        ("default device", str(choose_device("auto"))),
    ):
        facts.add_row(name, value)
    console.print(facts)
    backends = Table(title="optional packages")
    for heading in ("package", "active", "detail", "for"):
        backends.add_column(heading, overflow="fold")
    for backend in optional_backends():
        backends.add_row(
            backend.package, "yes" if backend.active else "no", backend.detail, backend.purpose
        )
    console.print(backends)
