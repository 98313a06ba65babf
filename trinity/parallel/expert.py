"""Expert parallelism: each rank of a group holds some of a layer's experts whole.

Tokens travel to the ranks of their experts and back, one row for each (token, expert) pair. The
group takes its ranks from the data, context and tensor axes, so that every rank comes with tokens
of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from trinity.models.staged import StagedModel
from trinity.nn.feedforward import GroupedExperts
from trinity.parallel.collectives import RowsInFlight, exchange_rows
from trinity.parallel.deep_ep import DeepEPDispatcher
from trinity.parallel.local import compute_with_local_parameters


class AllToAllDispatcher:
    """Experts spread over ``group``: rank r holds the r-th of equal blocks of them.

    Rows arrive sorted by sender and expert. Routing weights travel along and are applied by the
    experts, so that outputs need not be kept for the backward at the sender.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.experts_per_rank = num_experts // self.num_ranks

    def __call__(
        self,
        experts: GroupedExperts,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """(T, D) -> (T, D), and the result of ``meanwhile``, computed while the rows travel."""
        expert_R = index_TK.flatten()
        order_R = torch.argsort(expert_R, stable=True)
        send_rows, receive_rows, arriving_NE = exchange_counts(
            expert_R, self.num_ranks, self.experts_per_rank, self.group
        )
        flight = RowsInFlight(send_rows, receive_rows, self.group)
        rows_RD = flight.start(x_TD.index_select(0, order_R // index_TK.shape[1]))
        other = meanwhile()
        weight_R = weight_TK.flatten().index_select(0, order_R)
        weight_R1 = exchange_rows(weight_R, send_rows, receive_rows, self.group).unsqueeze(1)
        local_R1 = local_expert(arriving_NE, sum(receive_rows)).unsqueeze(1)
        out_RD = experts(flight.finish(rows_RD), local_R1, weight_R1)
        back_RD = exchange_rows(out_RD, receive_rows, send_rows, self.group)
        slot_R = torch.empty_like(order_R)
        slot_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        return back_RD.index_select(0, slot_R).unflatten(0, index_TK.shape).sum(1), other


def exchange_counts(
    expert_R: Tensor, num_ranks: int, experts_per_rank: int, group: dist.ProcessGroup
) -> tuple[list[int], list[int], Tensor]:
    """Rows for each rank, rows from each rank, and those by sender and expert of this rank (N, E).

    The one place where the host waits for the device: an exchange must know its sizes.
    """
    count_NE = torch.bincount(expert_R, minlength=num_ranks * experts_per_rank)
    count_NE = count_NE.view(num_ranks, experts_per_rank)
    arriving_NE = torch.empty_like(count_NE)
    dist.all_to_all_single(arriving_NE, count_NE, group=group)
    send_rows, receive_rows = torch.stack((count_NE.sum(1), arriving_NE.sum(1))).tolist()
    return send_rows, receive_rows, arriving_NE


def local_expert(arriving_NE: Tensor, num_rows: int) -> Tensor:
    """The expert, counted from this rank's first, of each row that arrives."""
    num_ranks, experts_per_rank = arriving_NE.shape
    expert_E = torch.arange(experts_per_rank, device=arriving_NE.device)
    return torch.repeat_interleave(
        expert_E.repeat(num_ranks), arriving_NE.flatten(), output_size=num_rows
    )


DISPATCHERS = {"all_to_all": AllToAllDispatcher, "deep_ep": DeepEPDispatcher}


def shard_experts(model: StagedModel, mesh: DeviceMesh, dispatcher: str) -> None:
    """Leave on each rank of ``mesh`` its block of every layer's experts; tokens will travel.

    ``dispatcher`` is a key of ``DISPATCHERS``; raises ConfigError when its package is missing.
    """
    for moe in model.moe_layers():
        experts = moe.experts
        for name, parameter in list(experts.named_parameters()):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(sharded))
        compute_with_local_parameters(experts, [Shard(0)])
        moe.dispatcher = DISPATCHERS[dispatcher](mesh.get_group(), moe.num_experts)
