"""What a rank has of the model, with everything a training step needs to know of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from trinity.core.batch import AnyBatch
from trinity.core.config import RunConfig
from trinity.models.staged import StagedModel
from trinity.nn.moe import MoE
from trinity.parallel.mesh import Layout, Meshes
from trinity.parallel.pipeline import Pipeline
from trinity.parallel.plan import build_stages
from trinity.parallel.stage import Stage


class ParallelModel:
    """The stages of this rank and the meshes they live on; ``meshes`` is None for one process."""

    def __init__(
        self, stages: list[Stage], config: RunConfig, meshes: Meshes | None, device: torch.device
    ) -> None:
        self.stages = stages
        self.config = config
        self.meshes = meshes
        self.device = device
        self.layout = meshes.layout if meshes is not None else Layout()
        self.pipeline = Pipeline(stages, config, meshes, device)

    @classmethod
    def build(cls, config: RunConfig, meshes: Meshes | None, device: torch.device) -> ParallelModel:
        """This rank's part of the initial model that the configuration's seed determines."""
        return cls(build_stages(config, meshes, device), config, meshes, device)

    @classmethod
    def whole(cls, model: StagedModel, config: RunConfig) -> ParallelModel:
        """A model that is all on this process, as it is."""
        device = next(model.parameters()).device
        return cls([Stage(model, config, index=0, num_stages=1)], config, None, device)

    @property
    def whole_model(self) -> StagedModel | None:
        """The whole model where it is whole on this process."""
        return self.stages[0].model if self.meshes is None else None

    @property
    def dp_rank(self) -> int:
        """Which share of the rows this rank reads."""
        return self.layout.dp_rank(self.meshes.rank) if self.meshes is not None else 0

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of all stages of this rank, by their names in the whole model."""
        for stage in self.stages:
            yield from stage.model.named_parameters()

    def parameters(self) -> Iterator[Tensor]:
        """Parameters of all stages of this rank."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers, by their names in the whole model; they alias the model's."""
        named: dict[str, Tensor] = {}
        for stage in self.stages:
            named |= stage.model.state_dict()
        return named

    def moe_rows(self) -> Iterator[tuple[int, MoE]]:
        """Layers with experts on this rank, with their row among those of the whole model."""
        for stage in self.stages:
            for name, block in stage.model.backbone.layers.items():
                if isinstance(block.ffn, MoE):
                    yield self.config.model.moe_layers.index(int(name)), block.ffn

    def local_batch(self, batch: AnyBatch) -> AnyBatch:
        """The rank's part of the rows of a batch, on its device."""
        moved = type(batch)(*(field.to(self.device) for field in batch))
        if self.layout.cp == 1:
            return moved
        assert self.meshes is not None
        return moved.part_of_rows(self.meshes.at.cp, self.layout.cp)

    def add_up(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.meshes is not None:
            dist.all_reduce(values)
        return values

    def sharded_over_data(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor that is divided among the data-parallel ranks, in order."""
        if self.meshes is None:
            return tensor
        placements = [Replicate(), Shard(0), Replicate()]
        return DTensor.from_local(tensor, self.meshes.data, placements, run_check=False)

    def group_of_axes(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """The ranks among which matrices are cut along these axes."""
        assert self.meshes is not None
        return self.meshes.group_along(axes)


def own_share(batches: Sequence[AnyBatch], rank: int, num_ranks: int) -> list[AnyBatch]:
    """Every ``num_ranks``-th batch; ranks get equally many, some perhaps with nothing to predict.

    Collectives inside the model need every rank to make the same calls.
    """
    share = list(batches[rank::num_ranks])
    if len(share) < -(-len(batches) // num_ranks):
        share.append(batches[-1].without_targets())
    return share
