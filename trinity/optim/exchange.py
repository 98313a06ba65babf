"""Whole matrices out of shards and back, for an optimizer that needs whole matrices.

Matrices of one shape and one way of sharding travel together: one all-to-all brings each rank the
parts of the few matrices it will work on, another takes the results back. Each rank works on 1/N of
the matrices, nothing is computed twice, and nothing is gathered everywhere (the scheme of the Dion
library's Muon, extended to parts of any size and to two mesh axes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trinity.core.sharding import Region, region_at

GroupOfAxes = Callable[[tuple[str, ...]], dist.ProcessGroup]
"""The process group along mesh axes of these names, ranks in mesh order."""


def matrix_axes(tensor: Tensor) -> tuple[str, ...]:
    """Mesh axes that cut rows or columns of the tensor's matrices (its last two dims)."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names
    assert names is not None
    first = tensor.ndim - 2
    return tuple(
        name
        for name, size, placement in zip(
            names, tensor.device_mesh.shape, tensor.placements, strict=True
        )
        if size > 1
        and isinstance(placement, Shard | _StridedShard)
        and placement.dim % tensor.ndim >= first
    )


class MatrixExchange:
    """How the matrices of tensors like ``tensor`` are spread over ``group``.

    Args:
        tensor: gives shape of the matrices, mesh and placements.
        axes: the result of :func:`matrix_axes`, not empty.
        group: its ranks along these axes.
    """

    def __init__(self, tensor: DTensor, axes: tuple[str, ...], group: dist.ProcessGroup) -> None:
        self.group = group
        self.matrix_shape = tuple(tensor.shape[-2:])
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.regions = _matrix_regions(tensor, axes)
        assert len(self.regions) == self.num_ranks
        self.num_bytes = 0
        """Sent by this rank since this was last set to 0."""

    def owned(self, num_matrices: int, turn: int) -> list[int]:
        """How many matrices each rank works on; ``turn`` moves the surplus round the ranks."""
        share, surplus = divmod(num_matrices, self.num_ranks)
        return [
            share + ((rank - turn) % self.num_ranks < surplus) for rank in range(self.num_ranks)
        ]

    def collect(self, parts_Nrc: Tensor, owned: Sequence[int]) -> Tensor:
        """Parts of all matrices in, whole matrices that this rank works on out."""
        local = parts_Nrc.shape[1] * parts_Nrc.shape[2]
        sizes = [_area(region) for region in self.regions]
        received = self._all_to_all(
            parts_Nrc.flatten(),
            [count * local for count in owned],
            [owned[self.rank] * size for size in sizes],
        )
        whole_NMN = parts_Nrc.new_empty(owned[self.rank], *self.matrix_shape)
        for region, part in zip(
            self.regions, received.split([owned[self.rank] * s for s in sizes]), strict=True
        ):
            target = whole_NMN[:, region[0], region[1]]
            target.copy_(part.view(target.shape))
        return whole_NMN

    def give_back(self, whole_NMN: Tensor, owned: Sequence[int], like_Nrc: Tensor) -> Tensor:
        """The reverse of :meth:`collect`."""
        local = like_Nrc.shape[1] * like_Nrc.shape[2]
        outgoing = torch.cat(
            [whole_NMN[:, region[0], region[1]].flatten() for region in self.regions]
        )
        received = self._all_to_all(
            outgoing,
            [owned[self.rank] * _area(region) for region in self.regions],
            [count * local for count in owned],
        )
        return received.view(like_Nrc.shape)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = x.new_empty(sum(receive))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group)
        self.num_bytes += (x.numel() - send[self.rank]) * x.element_size()
        return out


def _matrix_regions(tensor: DTensor, axes: tuple[str, ...]) -> list[Region]:
    """Rows and columns that each rank along ``axes`` holds, in the order of their group."""
    mesh = tensor.device_mesh
    names, coordinate = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None
    assert coordinate is not None
    varying = [names.index(axis) for axis in axes]
    coordinates = [list(coordinate)]
    for axis in varying:
        coordinates = [
            [*at[:axis], index, *at[axis + 1 :]]
            for at in coordinates
            for index in range(mesh.size(axis))
        ]
    return [region_at(tensor.shape, mesh.shape, tensor.placements, at)[-2:] for at in coordinates]


def _area(region: Region) -> int:
    rows, columns = (part.stop - part.start for part in region)
    return rows * columns


def split_evenly(counts: Sequence[int], limit: int) -> list[slice]:
    """Cut a sequence of sizes into runs whose sum stays within ``limit``, one at least in each."""
    runs, first, total = [], 0, 0
    for index, count in enumerate(counts):
        if index > first and total + count > limit:
            runs.append(slice(first, index))
            first, total = index, 0
        total += count
    if counts:
        runs.append(slice(first, len(counts)))
    return runs
