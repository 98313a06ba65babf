"""What GPUs, links and memories can do: data sheets and efficiencies, read from hardware.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trinity.core.errors import ConfigError

TABLE = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU and the network it usually comes with. FLOP/s dense; bytes; bytes/s."""

    name: str
    bf16_flops: float
    fp8_flops: float
    fp32_flops: float
    """Without tensor cores."""
    hbm_bytes: float
    hbm_bandwidth: float
    nvlink_bandwidth: float
    """Per GPU and direction."""
    num_nvlink_gpus: int
    """GPUs that reach one another over NVLink."""
    rdma_bandwidth: float
    """Per GPU and direction."""
    source: str

    def members_per_node(self, size: int, stride: int) -> int:
        """How many of a group of ``size`` ranks, ``stride`` apart, share one NVLink domain.

        Groups are aligned powers of two in practice; of a rack of 72 GPUs they fill 64.
        """
        node = 1 << (self.num_nvlink_gpus.bit_length() - 1)
        return max(1, min(size, node // stride))


@dataclass(frozen=True)
class Efficiency:
    """Fractions of peaks that real programs get; the reasons stand in hardware.toml."""

    gemm_bf16: float
    gemm_fp8: float
    gemm_fp32: float
    gemm_half_dim: float
    attention: float
    hbm: float
    eager_passes: float
    nvlink: float
    rdma: float
    rdma_all_to_all: float
    collective_start_s: float
    collective_doubling_s: float
    block_launch_s: float
    overlap_tax: float
    router_imbalance_time: float
    router_imbalance_memory: float
    other: float
    runtime_bytes: float
    usable_memory: float


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def gpu_names() -> list[str]:
    """Every kind there is."""
    return list(_table()["gpu"])


def load_gpu(name: str) -> Gpu:
    """The entry of that name. Raises ConfigError naming those that exist."""
    entries = _table()["gpu"]
    if name not in entries:
        raise ConfigError(f"--gpu {name} is unknown; use one of {', '.join(entries)}")
    return Gpu(name=name, **entries[name])


@cache
def load_efficiency() -> Efficiency:
    """The one set of efficiencies."""
    return Efficiency(**_table()["efficiency"])
