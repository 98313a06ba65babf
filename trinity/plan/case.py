"""One candidate: a configuration, a model shape and a layout, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from trinity.core.config import ParallelConfig, RunConfig
from trinity.core.image_run_config import ImageRunConfig
from trinity.nn.patch_ends import NUM_VECTORS
from trinity.parallel.mesh import Layout
from trinity.parallel.stage import layers_of_stage, stages_of_rank
from trinity.plan.shapes import BlockShape, EndShape, ModelShape

ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class StagePart(NamedTuple):
    """What one pipeline rank runs. Parts that are alike are equal, and quick to look up."""

    kinds: tuple[tuple[BlockShape, int], ...]
    """How many blocks of each kind."""
    ends: EndShape
    """What comes before and after the blocks, where it is here."""

    @property
    def has_first(self) -> bool:
        """Whether the first stage is here."""
        return self.ends.has_first

    @property
    def has_last(self) -> bool:
        """Whether the last stage is here."""
        return self.ends.has_last


@dataclass(frozen=True)
class Case:
    """How much each rank has of everything. Tokens are those of one microbatch."""

    config: RunConfig
    shape: ModelShape
    layout: Layout

    def with_recompute(self, mode: str) -> Case:
        """The same with another recompute mode."""
        train = self.config.train.model_copy(update={"recompute": mode})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    @cached_property
    def tokens(self) -> int:
        """Tokens whose attention a tensor-parallel group computes together: rows x part of row."""
        batch = self.config.batch
        return batch.microbatch_rows * batch.sequence_length // self.layout.cp

    @cached_property
    def moe_tokens(self) -> int:
        """Tokens that this rank alone routes."""
        return self.tokens // self.layout.tp

    @cached_property
    def rows_per_token(self) -> float:
        """Rows that a token sends to other ranks' experts: one for each of its experts, or one for
        each rank that has any of them. Choices are taken as independent."""
        choices, ranks = self.shape.config.num_experts_per_tok, self.layout.ep
        if self.config.parallel.dispatcher == "all_to_all":
            return choices
        return ranks * (1 - (1 - 1 / ranks) ** choices)

    @cached_property
    def stream_tokens(self) -> int:
        """Tokens whose residual stream and norms are on this rank."""
        return self.moe_tokens if self.config.parallel.sequence_parallel else self.tokens

    @cached_property
    def images_per_row(self) -> int:
        """Most images that a row can hold; 0 for texts."""
        config = self.config
        return config.images_per_row if isinstance(config, ImageRunConfig) else 0

    @cached_property
    def is_packed(self) -> bool:
        """Whether a row holds several images, so that each token has a modulation of its own."""
        return self.images_per_row > 1

    @cached_property
    def reach(self) -> int:
        """Tokens of which each may see any other: of a row of text, or of an image."""
        config = self.config
        if isinstance(config, ImageRunConfig):
            return config.tokens_of_image
        return config.batch.sequence_length

    @cached_property
    def extra_positions(self) -> int:
        """Positions that the vectors of images take beside the tokens, on every rank alike."""
        return self.config.batch.microbatch_rows * self.images_per_row * NUM_VECTORS

    @cached_property
    def num_microbatches(self) -> int:
        """Microbatches of a step."""
        batch = self.config.batch
        return batch.rows_per_step // (self.layout.dp * batch.microbatch_rows)

    @cached_property
    def num_stages(self) -> int:
        """Pipeline stages of the whole model."""
        if self.layout.pp == 1:
            return 1
        return self.layout.pp * self.config.parallel.pp_stages_per_rank

    @cached_property
    def stages_per_rank(self) -> int:
        """Pipeline stages of one rank."""
        return self.num_stages // self.layout.pp

    @cached_property
    def parts(self) -> list[StagePart]:
        """What each pipeline rank runs."""
        parallel = self.config.parallel
        schedule = (parallel.pp_schedule, parallel.pp_stages_per_rank)
        return _parts(self.shape, self.layout.pp, *schedule)

    @cached_property
    def is_resident(self) -> bool:
        """Whether gathered parameters and unsharded gradients stay through the step.

        Pipeline schedules of torch do not reshard after a backward, so with a pipeline they do
        whatever ``reshard_after_forward`` says.
        """
        return self.layout.pp > 1 or not self.config.parallel.reshard_after_forward

    @cached_property
    def gathers_per_step(self) -> int:
        """How often blocks, embedding and head are gathered."""
        if not self.config.parallel.reshard_after_forward:
            return 1
        # A pipeline: every backward after a forward, and the very first forward.
        return self.num_microbatches + 1 if self.layout.pp > 1 else 2 * self.num_microbatches

    @cached_property
    def exact_gathers_per_step(self) -> int:
        """How often norms and routers are gathered; they stay from forward to backward."""
        return 1 if self.is_resident else self.num_microbatches

    @cached_property
    def reduces_per_step(self) -> int:
        """How often gradients are reduced."""
        return 1 if self.is_resident else self.num_microbatches

    @cached_property
    def compute_bytes(self) -> int:
        """Size of an element of gathered parameters and activations."""
        return ELEMENT_BYTES[self.config.train.precision]

    @cached_property
    def state_bytes(self) -> int:
        """Size of an element of parameters, gradients and optimizer state."""
        return max(4, self.compute_bytes)

    @cached_property
    def reduce_bytes(self) -> int:
        """Size of an element of a gradient on its way."""
        if self.compute_bytes == ELEMENT_BYTES["fp64"]:
            return self.compute_bytes
        return ELEMENT_BYTES[self.config.parallel.reduce_dtype]

    @cached_property
    def forward_passes(self) -> int:
        """Times that collectives inside blocks run in the forward direction: again on recompute."""
        return 1 if self.config.train.recompute == "none" else 2


@lru_cache(maxsize=256)
def _parts(shape: ModelShape, pp: int, schedule: str, stages_per_rank: int) -> list[StagePart]:
    num_stages = pp * stages_per_rank if pp > 1 else 1
    settings = ParallelConfig.model_construct(
        pp_schedule=schedule, pp_stages_per_rank=stages_per_rank
    )
    parts = []
    for pp_rank in range(pp):
        stages = stages_of_rank(pp_rank, pp, settings)
        layers = [
            layer
            for stage in stages
            for layer in layers_of_stage(shape.config.num_hidden_layers, stage, num_stages)
        ]
        ends = shape.ends[0 in stages, num_stages - 1 in stages]
        parts.append(StagePart(shape.kinds_of(layers), ends))
    return parts
