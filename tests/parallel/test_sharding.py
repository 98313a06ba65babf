"""Which part of a tensor is where: arithmetic against what PyTorch does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tools.ranks import on_ranks
from trinity.core.config import ParallelConfig
from trinity.core.sharding import local_region, local_tensor, num_copies, region_at, region_shape
from trinity.parallel.context import halo_positions
from trinity.parallel.stage import layers_of_stage, stages_of_rank


def _check_regions(tensor_dim: int, shape: tuple[int, ...]) -> None:
    """FSDP2 over 2 ranks of a matrix that a tensor axis of 2 has cut along ``tensor_dim``."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    module = nn.Module()
    placement = Replicate() if tensor_dim < 0 else Shard(tensor_dim)
    module.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [placement]))
    fully_shard(module, mesh=mesh["fsdp"])
    weight = module.weight
    assert isinstance(weight, DTensor)
    region = local_region(weight)
    assert torch.equal(local_tensor(weight), whole[region])
    assert region_shape(region) == tuple(local_tensor(weight).shape)
    assert num_copies(weight) == (2 if tensor_dim < 0 else 1)
    total = local_tensor(weight).sum() / num_copies(weight)
    torch.distributed.all_reduce(total)
    assert total == whole.sum()


@pytest.mark.parametrize(
    ("tensor_dim", "shape"),  # FSDP2 refuses a tensor axis that cuts the same dim unevenly
    [
        *[(-1, shape) for shape in ((8, 6), (7, 4), (1, 2), (5, 3, 4))],
        *[(0, shape) for shape in ((8, 6), (6, 3), (4, 3, 4))],
        *[(1, shape) for shape in ((8, 6), (7, 4), (1, 2), (5, 3, 4))],
    ],
)
def test_regions_of_fsdp_over_tensor_parallel(tensor_dim: int, shape: tuple[int, ...]) -> None:
    on_ranks(4, _check_regions, tensor_dim, shape)


def test_regions_follow_chunk_where_the_division_is_uneven() -> None:
    starts = [region_at((7, 2), (4,), (Shard(0),), (rank,))[0] for rank in range(4)]
    assert starts == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    starts = [region_at((5, 2), (4,), (Shard(0),), (rank,))[0] for rank in range(4)]
    assert starts == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]


@pytest.mark.parametrize(
    ("window", "receive"),
    [
        (1, [0, 0, 0, 0]),
        (2, [0, 0, 1, 0]),
        (9, [0, 0, 8, 0]),
        (12, [0, 3, 8, 0]),
        (100, [8, 8, 8, 0]),
        (None, [8, 8, 8, 0]),
    ],
)
def test_halo_of_the_last_of_four_ranks(window: int | None, receive: list[int]) -> None:
    assert halo_positions(3, 4, 8, window)[1] == receive


@pytest.mark.parametrize("window", [1, 5, 9, 20, None])
def test_what_one_rank_sends_the_other_expects(window: int | None) -> None:
    plans = [halo_positions(rank, 4, 8, window) for rank in range(4)]
    for a in range(4):
        for b in range(4):
            assert plans[a][0][b] == plans[b][1][a]


@pytest.mark.parametrize(("num_layers", "num_stages"), [(5, 2), (4, 4), (8, 4), (60, 8), (7, 3)])
def test_stages_cover_every_layer_once_and_evenly(num_layers: int, num_stages: int) -> None:
    parts = [layers_of_stage(num_layers, index, num_stages) for index in range(num_stages)]
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 2
    assert len(parts[0]) <= max(sizes)


def test_which_stages_a_rank_runs() -> None:
    interleaved = ParallelConfig(pp=4, pp_schedule="interleaved_1f1b", pp_stages_per_rank=2)
    assert [stages_of_rank(rank, 4, interleaved) for rank in (0, 3)] == [[0, 4], [3, 7]]
    folded = ParallelConfig(
        pp=4, pp_schedule="zbv", pp_stages_per_rank=2, reshard_after_forward=False
    )
    assert [stages_of_rank(rank, 4, folded) for rank in (0, 3)] == [[0, 7], [3, 4]]
