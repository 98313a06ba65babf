"""Expert dispatch through DeepEP, whose kernels move each token once to each rank that wants it.

An optional package for NVIDIA GPUs, installed from its own repository. Written against the
interface of its ``Buffer`` (V1); not yet run on GPUs. The tests run it on a buffer with the same
interface that communicates through gloo.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.nn.feedforward import GroupedExperts


class DeepEPDispatcher:
    """Experts spread over ``group``; see :class:`trinity.parallel.expert.AllToAllDispatcher`.

    Raises ConfigError when the package is missing.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        try:
            self.package = importlib.import_module("deep_ep")
        # A build for another CUDA or torch fails in all of these ways.
        except (ImportError, RuntimeError, AttributeError, OSError) as error:
            raise ConfigError(
                f'parallel.dispatcher="deep_ep" needs the package deep_ep ({error}); build it from '
                'its repository, or set parallel.dispatcher="all_to_all"'
            ) from None
        self.group = group
        self.num_experts = num_experts
        self._buffer: Any = None

    def __call__(
        self,
        experts: GroupedExperts,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) -> (T, D), and the result of ``meanwhile``."""
        exchange = _Exchange(self._buffer_for(x_TD), index_TK, self.num_experts)
        rows_RD, weight_RK = _Dispatch.apply(x_TD, weight_TK.float(), exchange)
        # Of a row's experts, those that live elsewhere are marked -1.
        row, choice = torch.where(exchange.local_RK >= 0)
        out_RD = experts(
            rows_RD.index_select(0, row),
            exchange.local_RK[row, choice].unsqueeze(1),
            weight_RK[row, choice].unsqueeze(1),
        )
        summed_RD = torch.zeros_like(rows_RD).index_add(0, row, out_RD)
        return _Combine.apply(summed_RD, exchange), meanwhile()

    def _buffer_for(self, x_TD: Tensor) -> Any:
        """One buffer for all calls, sized for rows of this width."""
        if self._buffer is None:
            buffer_class, size = self.package.Buffer, dist.get_world_size(self.group)
            hidden_bytes = x_TD.shape[1] * max(x_TD.element_size(), 2)
            configs = (
                buffer_class.get_dispatch_config(size),
                buffer_class.get_combine_config(size),
            )
            self._buffer = buffer_class(
                self.group,
                max(c.get_nvl_buffer_size_hint(hidden_bytes, size) for c in configs),
                max(c.get_rdma_buffer_size_hint(hidden_bytes, size) for c in configs),
            )
        return self._buffer


class _Exchange:
    """One dispatch and what is needed to send results and gradients back the same way."""

    def __init__(self, buffer: Any, index_TK: Tensor, num_experts: int) -> None:
        self.buffer, self.index_TK, self.num_experts = buffer, index_TK, num_experts
        self.handle: Any = None
        self.local_RK = index_TK

    def dispatch(self, x_TD: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        per_rank, per_node, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(
            self.index_TK, self.num_experts
        )
        rows_RD, local_RK, weight_RK, _, self.handle, _ = self.buffer.dispatch(
            x_TD,
            topk_idx=self.index_TK,
            topk_weights=weight_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        self.local_RK = local_RK
        return rows_RD, weight_RK

    def send_again(self, x_TD: Tensor) -> Tensor:
        """The same rows' worth of another tensor, where the handle says."""
        return self.buffer.dispatch(x_TD, handle=self.handle)[0]

    def combine(self, x_RD: Tensor, weight_RK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        combined = self.buffer.combine(x_RD, self.handle, topk_weights=weight_RK)
        return combined[0], combined[1]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return exchange.dispatch(x_TD.contiguous(), weight_TK.contiguous())

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_RK: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_TD, grad_TK = ctx.exchange.combine(grad_RD.contiguous(), grad_RK.contiguous())
        return grad_TD, grad_TK, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.combine(x_RD.contiguous())[0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.send_again(grad_TD.contiguous()), None
