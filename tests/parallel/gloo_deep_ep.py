"""The interface of DeepEP's Buffer (V1) over gloo, to run our dispatcher without a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    """Moves each token once to each rank that has one of its experts."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert num_nvl_bytes > 0
        self.group, self.size = group, dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        return _Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        self.per_rank = num_experts // self.size
        is_in_rank = torch.stack(
            [(topk_idx // self.per_rank == rank).any(1) for rank in range(self.size)], dim=1
        )
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return is_in_rank.sum(0), None, per_expert, is_in_rank, None

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group)
        return out

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if handle is not None:
            token, send, receive, _ = handle
            return self._exchange(x[token], send, receive), None, None, None, None, None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        arriving = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(arriving, num_tokens_per_rank, group=self.group)
        send, receive = num_tokens_per_rank.tolist(), arriving.tolist()
        _, token = torch.where(is_token_in_rank.T)
        rank = dist.get_rank(self.group)
        index = self._exchange(topk_idx[token], send, receive)
        local = torch.where(index // self.per_rank == rank, index % self.per_rank, -1)
        weights = self._exchange(topk_weights[token], send, receive)
        handle = (token, send, receive, len(x))
        rows = self._exchange(x[token], send, receive)
        return rows, local, weights.masked_fill(local < 0, 0), None, handle, None

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Any, ...]:
        token, send, receive, num_tokens = handle

        def back(rows: Tensor) -> Tensor:
            returned = self._exchange(rows, receive, send)
            return returned.new_zeros(num_tokens, rows.shape[1]).index_add(0, token, returned)

        return back(x), None if topk_weights is None else back(topk_weights), None
