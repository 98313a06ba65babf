"""Modules that hold distributed parameters and compute with this rank's part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


class _LocalParameters:
    """Mixed into a module's class: reading a parameter that is a DTensor gives its local tensor.

    The module's own code thus needs to know nothing of meshes, and every operator sees plain
    tensors; the optimizer and checkpoints still find the DTensor among the parameters.
    """

    gradient_placements: Sequence[Placement]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        # While FSDP2 has it sharded, the mesh has FSDP2's axes too, and FSDP2 itself is asking.
        if isinstance(value, DTensor) and value.device_mesh.ndim == len(self.gradient_placements):
            return value.to_local(grad_placements=self.gradient_placements)
        return value


def compute_with_local_parameters(
    module: nn.Module, gradient_placements: Sequence[Placement]
) -> None:
    """Let ``module`` read its own parameters as local tensors.

    Args:
        module: its children are not touched.
        gradient_placements: what the gradient of the local tensor is over the mesh of the
            parameter: ``Shard`` where ranks hold different parts, ``Partial`` where they hold the
            same values and each saw some of the tokens, ``Replicate`` where each saw all.
    """
    base = type(module)
    module.__class__ = type(base.__name__, (_LocalParameters, base), {})
    module.gradient_placements = gradient_placements  # type: ignore[assignment]
