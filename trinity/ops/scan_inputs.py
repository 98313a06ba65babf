"""What the backends of a scan are handed, and how its heads and documents are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.common import accumulate_dtype


class ScanInputs(NamedTuple):
    """The arguments of :func:`trinity.ops.scan.scan`, checked and cast."""

    q: Tensor
    """(B, S, H, d)"""
    k: Tensor
    """(B, S, G, d)"""
    v: Tensor
    """(B, S, U, e)"""
    log_decay: Tensor
    """(B, S, U), fp32 at least"""
    power: int
    normalize: bool
    scale: float
    document_ids: Tensor | None = None
    """(B, S)"""
    initial_state: Tensor | None = None
    """(B, U, features, e), with a column more where the scan normalizes"""
    return_state: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the products and of the output."""
        return self.q.dtype

    @property
    def scaled_q(self) -> Tensor:
        """Queries with the scale, where they carry it."""
        return self.q * self.scale if self.power == 1 else self.q

    @property
    def scaled_k(self) -> Tensor:
        """Keys with the scale, where they carry it."""
        return self.k * self.scale if self.power == 2 else self.k

    def widened(self) -> ScanInputs:
        """The same in fp32, or in fp64."""
        wide = accumulate_dtype(self.dtype)
        return self._replace(q=self.q.to(wide), k=self.k.to(wide), v=self.v.to(wide))


class Heads(NamedTuple):
    """How many heads share what."""

    groups: int
    """Heads of k."""
    queries_per_key: int
    """r: heads of q that read one state (grouped queries)."""
    values_per_key: int
    """m: states that share one head of k and q (the groups of Mamba-2)."""


def heads_of(q_BSHd: Tensor, k_BSGd: Tensor, v_BSUe: Tensor, log_decay_BSU: Tensor) -> Heads:
    """Read the numbers of heads off the shapes. Raises ConfigError when they do not fit."""
    num_q, num_k, num_v = q_BSHd.shape[2], k_BSGd.shape[2], v_BSUe.shape[2]
    grouped_queries = num_q % num_k == 0 and num_v == num_k
    grouped_keys = num_v % num_k == 0 and num_q == num_k
    same_rows = q_BSHd.shape[:2] == k_BSGd.shape[:2] == v_BSUe.shape[:2]
    if not (
        (grouped_queries or grouped_keys)
        and same_rows
        and log_decay_BSU.shape == v_BSUe.shape[:3]
        and q_BSHd.shape[3] == k_BSGd.shape[3]
    ):
        raise ConfigError(
            f"a scan of q {tuple(q_BSHd.shape)}, k {tuple(k_BSGd.shape)}, v {tuple(v_BSUe.shape)}, "
            f"log_decay {tuple(log_decay_BSU.shape)}: the heads of q must be a multiple of those "
            "of k and v, or those of v a multiple of those of k and q; decays go with v"
        )
    return Heads(num_k, num_q // num_k, num_v // num_k)


def runs_of(document_ids_BS: Tensor) -> Tensor:
    """Number of each token's document in its row, from 0; an id that comes back is a new one."""
    run_BS = torch.zeros_like(document_ids_BS, dtype=torch.int64)
    run_BS[:, 1:] = (document_ids_BS[:, 1:] != document_ids_BS[:, :-1]).cumsum(1)
    return run_BS
