"""The tuning table: which tile sizes a kernel uses, read from ``tuning.toml`` once per process.

Sizes never change what is computed beyond rounding, so a table measured on another device is safe.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

TABLE_PATH = Path(__file__).with_name("tuning.toml")
ANY_WIDTH = 0
"""Head dim under which kernels without heads are listed."""

_overrides: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("tuning", default=None)


@functools.cache
def load_table(path: Path = TABLE_PATH) -> dict[str, Any]:
    """The whole table."""
    return tomllib.loads(path.read_text())


def capability(device: torch.device) -> str:
    """The key of a device in the table: "sm_90" for compute capability 9.0, "any" off a GPU."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_capability = functools.cache(capability)


def settings(kernel: str, head_dim: int, device: torch.device) -> dict[str, int]:
    """Tile sizes of one kernel: those measured on this capability, else those of "any"."""
    rows = load_table()[kernel]
    measured = rows.get(_capability(device), {})
    found = measured.get(str(head_dim)) or rows["any"][str(head_dim)]
    return {**found, **(_overrides.get() or {}).get(kernel, {})}


@contextmanager
def override(kernel: str, **sizes: int) -> Iterator[None]:
    """Other sizes inside the block, for the search of better ones and for tests."""
    outer = _overrides.get() or {}
    token = _overrides.set({**outer, kernel: {**outer.get(kernel, {}), **sizes}})
    try:
        yield
    finally:
        _overrides.reset(token)
