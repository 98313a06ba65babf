"""The mixture-of-experts feed-forward: router, dispatcher, experts, shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import BackboneConfig
from trinity.nn.balance import sequence_balance_loss
from trinity.nn.feedforward import GroupedExperts, SwiGLU
from trinity.nn.router import SigmoidRouter


class Dispatcher(Protocol):
    """Brings routed tokens to their experts and the weighted outputs back."""

    def __call__(
        self,
        experts: GroupedExperts,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) -> (T, D), and the result of ``meanwhile``.

        ``meanwhile`` is work that needs nothing of this: it is called once, while tokens travel.
        """
        ...


class RowSum(NamedTuple):
    """How to add up counts over the processes that hold parts of the same rows."""

    num_parts: int = 1
    add_up: Callable[[Tensor], Tensor] | None = None


class LocalDispatcher:
    """All experts live on this process: nothing travels."""

    def __call__(
        self,
        experts: GroupedExperts,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) -> (T, D), and the result of ``meanwhile``."""
        return experts(x_TD, index_TK, weight_TK), meanwhile()


class MoE(nn.Module):
    """shared(x) + sum over chosen experts of weight * expert(x).

    The residual connection is outside, in the block.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = SigmoidRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.route_scale,
            sees_time=config.is_image,
        )
        self.experts = GroupedExperts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size
        )
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.row_sum = RowSum()
        self.num_buckets = config.load_buckets if isinstance(config, DiTConfig) else None
        shared_size = config.moe_intermediate_size * config.num_shared_experts
        self.shared = SwiGLU(config.hidden_size, shared_size) if shared_size else None

    def forward(
        self,
        x_BSD: Tensor,
        routed_by_BSD: Tensor | None = None,
        time_BSD: Tensor | None = None,
        bucket_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and what balancing needs to know of this pass.

        The second result is ``load_E``, the tokens sent to each expert, int64; the third is the
        sequence-wise balance loss summed over the rows. They are *returned*, never stored: a pass
        that is recomputed for the backward throws its own copy away, so every token counts
        exactly once under any recompute mode.

        Args:
            x_BSD: what the experts are given.
            routed_by_BSD: what the router is given instead of it. Where it saw the modulated state,
                the scale of the noise level would outweigh the token (arXiv 2604.12163).
            time_BSD: embedding of the noise level, for a router that sees it.
            bucket_BS: (B, S or 1), the row of the load (buckets, E) in which a token counts, none
                for -1.
        """
        x_TD = x_BSD.flatten(0, 1)
        routed_by_TD = x_TD if routed_by_BSD is None else routed_by_BSD.flatten(0, 1)
        routing = self.router(routed_by_TD, time_BSD)
        shared = self.shared
        routed_TD, shared_BSD = self.dispatcher(
            self.experts,
            x_TD,
            routing.index_TK,
            routing.weight_TK,
            lambda: None if shared is None else shared(x_BSD),
        )
        out_BSD = routed_TD.view_as(x_BSD)
        if shared_BSD is not None:
            out_BSD = out_BSD + shared_BSD
        rows = x_BSD.shape[:2]
        balance_loss = sequence_balance_loss(
            routing.scores_TE.unflatten(0, rows),
            routing.index_TK.unflatten(0, rows),
            self.num_experts,
            num_parts=self.row_sum.num_parts,
            sum_over_parts=self.row_sum.add_up,
        )
        index_BSK = routing.index_TK.unflatten(0, rows)
        return out_BSD, self._load(index_BSK, bucket_BS), balance_loss

    def _load(self, index_BSK: Tensor, bucket_BS: Tensor | None) -> Tensor:
        """Visits of each expert, (E,), or by bucket, (buckets, E)."""
        ones = torch.ones_like(index_BSK)
        num_buckets = 1
        if bucket_BS is not None:
            assert self.num_buckets is not None
            num_buckets = self.num_buckets
            ones = ones * (bucket_BS >= 0).unsqueeze(-1)
            index_BSK = index_BSK + bucket_BS.clamp(min=0).unsqueeze(-1) * self.num_experts
        # Not bincount, which on a GPU waits for the device to learn the size of its result.
        load = index_BSK.new_zeros(num_buckets * self.num_experts)
        load.scatter_add_(0, index_BSK.flatten(), ones.flatten())
        return load if bucket_BS is None else load.view(num_buckets, self.num_experts)
