"""Which part of a tensor a rank holds: plain arithmetic over placements, no communication."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

Region = tuple[slice, ...]
"""One slice of the whole tensor per dim."""


def local_tensor(tensor: Tensor) -> Tensor:
    """The values that are here: those of a plain tensor, or a DTensor's local part, sharing memory.

    No gradient flows through a DTensor's.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return tensor


def local_region(tensor: Tensor) -> Region:
    """Where :func:`local_tensor` lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return region_at(tensor.shape, tensor.device_mesh.shape, tensor.placements, coordinate)


def region_at(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Region:
    """The part of a tensor of ``shape`` that the rank at ``coordinate`` of the mesh holds.

    Each axis cuts a dim as ``torch.chunk`` does, so the last parts may be shorter or empty. FSDP2
    writes ``_StridedShard`` for an axis that cuts what an axis further right has already cut.
    """
    starts, sizes = [0] * len(shape), list(shape)
    axes = list(zip(mesh_shape, placements, coordinate, strict=True))
    plain = [axis for axis in axes if isinstance(axis[1], Shard) and not _is_strided(axis[1])]
    strided = [axis for axis in axes if _is_strided(axis[1])]
    for num_parts, placement, index in plain + strided:
        assert isinstance(placement, Shard | _StridedShard)
        dim = placement.dim % len(shape)
        part = -(-sizes[dim] // num_parts)
        start = min(index * part, sizes[dim])
        starts[dim] += start
        sizes[dim] = min(part, sizes[dim] - start)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def region_shape(region: Region) -> tuple[int, ...]:
    """Sizes of a region."""
    return tuple(part.stop - part.start for part in region)


def num_copies(tensor: Tensor) -> int:
    """How many ranks of the tensor's mesh hold the very values that are here.

    A sum over ranks of (local sum / copies) counts every element once.
    """
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def _is_strided(placement: Placement) -> bool:
    return isinstance(placement, _StridedShard)
