"""Copies of tensors beside the training: in host memory, or on a disk of the machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from trinity.core.job import rank


class HostStaging:
    """Host memory for one copy of a set of tensors, allocated once and filled again and again.

    It costs as many bytes as this rank's part of the tensors has. For what comes from an
    accelerator the memory is pinned, which torch allocates in powers of two: up to twice as many.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        """The copies by name; DTensors have the mesh, placements and shape of their originals."""
        self._buffers: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size of what is held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` as they are now; when it returns, the originals may change.

        Raises RuntimeError when there is not enough host memory.
        """
        self.tensors = {}
        old, self._buffers = self._buffers, {}
        accelerators: set[torch.device] = set()
        for name, tensor in tensors.items():
            local = _local(tensor)
            buffer = old.pop(name, None)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty_like(local, device="cpu", pin_memory=not local.is_cpu)
            buffer.copy_(local, non_blocking=True)
            if not local.is_cpu:
                accelerators.add(local.device)
            self._buffers[name] = buffer
            self.tensors[name] = _like(tensor, buffer)
        for device in accelerators:
            torch.accelerator.current_stream(device).synchronize()

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Write the copies back into tensors of the same names; returns those."""
        assert tensors.keys() == self._buffers.keys()
        for name, tensor in tensors.items():
            _local(tensor).copy_(self._buffers[name])
        return tensors

    def clear(self) -> None:
        """Give the memory back."""
        self.tensors, self._buffers = {}, {}


class DiskStaging:
    """The same on a disk of this machine, one file for each rank: for hosts without the memory.

    No checkpoint: nothing is synced, and nothing survives the job. ``fill`` takes as long as the
    disk takes to write.
    """

    def __init__(self, directory: Path) -> None:
        """The file is made in ``directory`` and removed by :meth:`clear`."""
        directory.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(".safetensors", f"rank{rank()}-", directory)
        os.close(number)
        self._path = Path(name)

    @property
    def num_bytes(self) -> int:
        """Size of what is held."""
        return self._path.stat().st_size

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors`` as they are now. Raises OSError when the disk is full."""
        save_file({name: _local(t).contiguous().cpu() for name, t in tensors.items()}, self._path)

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Write the copies back into tensors of the same names; returns those."""
        with safe_open(self._path, framework="pt") as file:
            assert tensors.keys() == set(file.keys())
            for name, tensor in tensors.items():
                _local(tensor).copy_(file.get_tensor(name))
        return tensors

    def clear(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _like(original: Tensor, local: Tensor) -> Tensor:
    """``local``, in the place of the original's local part."""
    if not isinstance(original, DTensor):
        return local
    # DTensor.from_local would move the copy back to the device of the mesh.
    return DTensor(local, original._spec, requires_grad=False)
