"""Runs the microbatches of a step through this rank's stages: alone, or in a pipeline schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.pipelining as pipelining
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trinity.core.batch import AnyBatch, FlowBatch
from trinity.core.config import RunConfig
from trinity.core.runtime import compute_dtype
from trinity.parallel.mesh import Meshes
from trinity.parallel.stage import Stage, StepCounts

SCHEDULES = {
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}


class Pipeline:
    """All stages of this rank, and how microbatches pass through them."""

    def __init__(
        self, stages: list[Stage], config: RunConfig, meshes: Meshes | None, device: torch.device
    ) -> None:
        self.stages = stages
        self.config = config
        self.meshes = meshes
        self.device = device
        self._schedules: dict[int, pipelining.schedules._PipelineSchedule] = {}

    @property
    def num_ranks(self) -> int:
        """Ranks that the layers are spread over."""
        return self.meshes.layout.pp if self.meshes is not None else 1

    def forward_backward(self, microbatches: Sequence[AnyBatch], counts: StepCounts) -> None:
        """Accumulate the gradients of all microbatches; losses are with the stages after."""
        for stage in self.stages:
            stage.counts = counts
        if self.num_ranks > 1:
            self._schedule(microbatches).step(
                *self._inputs(microbatches),
                target=self._target(microbatches),
                **self._keywords(microbatches),
            )
            return
        (stage,) = self.stages
        for number, batch in enumerate(microbatches):
            self._mark(stage, is_last=number + 1 == len(microbatches))
            stage(batch[0], **_given(batch)).backward()

    def _mark(self, stage: Stage, *, is_last: bool) -> None:
        """Where memory allows it, gather parameters and reduce gradients once per step only."""
        if isinstance(stage, FSDPModule) and not self.config.parallel.reshard_after_forward:
            stage.set_is_last_backward(is_last)
            stage.set_reshard_after_backward(is_last)
            stage.set_requires_gradient_sync(is_last)

    @torch.no_grad()
    def forward(self, microbatches: Sequence[AnyBatch]) -> None:
        """Losses only; they are with the stages after."""
        if self.num_ranks > 1:
            # A pipeline must be full: the last microbatch again, whose extra losses are dropped.
            num_missing = max(0, self._num_stages() - len(microbatches))
            padded = [*microbatches, *[microbatches[-1]] * num_missing]
            self._schedule(padded).eval(
                *self._inputs(padded), target=self._target(padded), **self._keywords(padded)
            )
            for stage in self.stages:
                del stage.losses[len(microbatches) :]
            return
        (stage,) = self.stages
        for batch in microbatches:
            stage(batch[0], **_given(batch))

    def _num_stages(self) -> int:
        return self.stages[0].num_stages

    def _inputs(self, microbatches: Sequence[AnyBatch]) -> tuple[Tensor, ...]:
        if self.stages[0].index > 0:
            return ()
        return (torch.cat([batch[0] for batch in microbatches]),)

    def _keywords(self, microbatches: Sequence[AnyBatch]) -> dict[str, Any]:
        """What every stage is given by its own rank, cut into microbatches by the schedule."""
        given = [_given(batch) for batch in microbatches]
        return {name: torch.cat([fields[name] for fields in given]) for name in given[0]}

    def _target(self, microbatches: Sequence[AnyBatch]) -> Tensor | None:
        """The schedule wants one where the last stage is, although the stage has its own."""
        is_last = any(stage.is_last for stage in self.stages)
        return torch.zeros(len(microbatches)) if is_last else None

    def _schedule(self, microbatches: Sequence[AnyBatch]) -> pipelining.schedules._PipelineSchedule:
        """The schedule for this many microbatches; a batch-size ramp needs a few."""
        num = len(microbatches)
        if num not in self._schedules:
            assert self.meshes is not None
            stages = [self._pipeline_stage(s, microbatches[0]) for s in self.stages]
            name = self.config.parallel.pp_schedule
            self._schedules[num] = SCHEDULES[name](
                stages[0] if name == "1f1b" else stages,  # type: ignore[arg-type]
                num,
                loss_fn=_objective,
                scale_grads=False,
            )
        return self._schedules[num]

    def _pipeline_stage(self, stage: Stage, batch: AnyBatch) -> pipelining.PipelineStage:
        """With shapes given: inferring them would run the stage once more."""
        assert self.meshes is not None
        model = self.config.model
        rows, positions = batch[0].shape[:2]
        split = stage.model.backbone.row_part.stream_split
        num_images = batch.sigma_BN.shape[1] if isinstance(batch, FlowBatch) else 0
        dtype = compute_dtype(self.config.train.precision)
        hidden = torch.empty(
            rows,
            positions // split + stage.model.num_extra_positions(num_images),
            model.hidden_size,
            dtype=dtype,
            device="meta",
            requires_grad=True,
        )
        taken_in = torch.empty_like(batch[0], device="meta")
        objective = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        return pipelining.PipelineStage(
            stage,
            stage.index,
            stage.num_stages,
            self.device,
            input_args=taken_in if stage.index == 0 else hidden,
            output_args=objective.requires_grad_() if stage.is_last else hidden,
            group=self.meshes.dense["pp"].get_group(),
        )


def _given(batch: AnyBatch) -> dict[str, Tensor]:
    """What every stage knows of a batch."""
    return dict(zip(batch._fields[1:], batch[1:], strict=True))


def _objective(output: Tensor, _target: Tensor) -> Tensor:
    """The last stage has formed the loss itself, inside FSDP's hooks."""
    return output.sum()
