"""Applies a layout to a model, from outside and in the one order that works.

A model comes in on the meta device and goes out on the real one, with this rank's part of the
initial weights: pipeline stage, tensor and expert shards, context exchange, compile, recompute,
FSDP2, memory, values.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from trinity.core.config import RunConfig
from trinity.models.backbone import RowPart
from trinity.models.build import model_on_meta
from trinity.models.staged import StagedModel
from trinity.nn.block import Block
from trinity.nn.mamba2 import Skip
from trinity.nn.modulation import Modulation
from trinity.nn.moe import MoE, RowSum
from trinity.nn.norm import RMSNorm
from trinity.nn.patch_ends import ImageCondition
from trinity.nn.rates import Rates
from trinity.nn.router import SigmoidRouter
from trinity.parallel.context import share_rows
from trinity.parallel.expert import shard_experts
from trinity.parallel.mesh import Layout, Meshes, expert_shard_dim
from trinity.parallel.precision import use_fp8
from trinity.parallel.recompute import apply_recompute
from trinity.parallel.stage import Stage, keep_stage, stages_of_rank
from trinity.parallel.tensor import shard_tensors

KEPT_EXACT = (RMSNorm, SigmoidRouter, Rates, Skip, Modulation)
"""Their parameters are used in fp32 in any precision."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def build_stages(config: RunConfig, meshes: Meshes | None, device: torch.device) -> list[Stage]:
    """The parts of the model that this rank trains, with their initial values.

    ``meshes`` is None without a process group: the whole model, nothing cut.
    """
    stages = shape_stages(config, meshes)
    for stage in stages:
        stage.to_empty(device=device)
        stage.model.initialize(config.seed)
    return stages


def shape_stages(config: RunConfig, meshes: Meshes | None) -> list[Stage]:
    """The same without memory, on the meta device: one stage, or several of a pipeline."""
    layout = meshes.layout if meshes is not None else Layout()
    num_stages = layout.pp * config.parallel.pp_stages_per_rank if layout.pp > 1 else 1
    mine = stages_of_rank(meshes.at.pp if meshes is not None else 0, layout.pp, config.parallel)
    return [_shape_stage(config, meshes, index, num_stages) for index in mine]


def _shape_stage(config: RunConfig, meshes: Meshes | None, index: int, num_stages: int) -> Stage:
    model = model_on_meta(config.model)
    if config.train.precision == "fp64":
        model.double()
        for moe in model.moe_layers():  # balancing state is fp32 in any precision
            moe.router.float_state()
    keep_stage(model, index, num_stages)
    use_fp8(model, config.train.fp8)
    if meshes is not None:
        _cut(model, meshes, config)
    if config.train.compile:  # before recompute, which would hide the blocks from the compiler
        for block in model.backbone.layers.values():
            block.forward = torch.compile(block.forward)
    apply_recompute(model.backbone.layers.values(), config.train.recompute)
    same_loss = meshes.layout.tp if meshes is not None and model.loss_is_whole else 1
    stage = Stage(model, config, index=index, num_stages=num_stages, num_loss_ranks=same_loss)
    if meshes is not None:
        shard_parameters(stage, meshes, config)
    return stage


def _cut(model: StagedModel, meshes: Meshes, config: RunConfig) -> None:
    """Tensor, expert and context parallelism."""
    layout = meshes.layout
    if layout.tp > 1:
        shard_tensors(
            model, meshes.dense["tp"], sequence_parallel=config.parallel.sequence_parallel
        )
    if layout.ep > 1:
        shard_experts(model, meshes.sparse["ep"], config.parallel.dispatcher)
    if layout.cp > 1:
        share_rows(model.backbone.layers.values(), meshes.rows["cp"].get_group())
    splits = config.parallel.sequence_parallel
    model.backbone.row_part = RowPart(
        meshes.at.cp, layout.tp if splits else 1, meshes.at.tp if splits else 0
    )
    if layout.cp * layout.tp > 1:
        add_up = partial(_add_up, group=meshes.row_parts.get_group())
        for moe in model.moe_layers():
            moe.row_sum = RowSum(layout.cp * layout.tp, add_up)


def _add_up(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def shard_parameters(stage: Stage, meshes: Meshes, config: RunConfig) -> None:
    """FSDP2: a group for each block's matrices, one for its experts, one for embedding and head.

    Norms and routers, which are used in fp32 in any precision, form one group of the whole stage;
    they are small and stay gathered through the step.

    Gradients are summed, never averaged: every loss is already divided by the token count of the
    whole step. The number of ranks that hold an expert differs from the number that hold another
    parameter, so an average would scale the two differently.
    """
    gathered = torch.bfloat16 if config.train.precision == "bf16" else None
    reduced = torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else torch.float32
    if config.train.precision == "fp64":
        reduced = torch.float64
    narrow = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False
    )
    shard = partial(
        fully_shard,
        mp_policy=narrow,
        reshard_after_forward=config.parallel.reshard_after_forward,
    )
    blocks = list(stage.model.backbone.layers.values())
    exact = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    kept_exact = [module for block in blocks for module in _kept_exact(block)]
    fully_shard(kept_exact, mesh=meshes.fsdp, mp_policy=exact, reshard_after_forward=False)
    for block in blocks:
        assert isinstance(block, Block)
        if isinstance(block.ffn, MoE):
            dim = expert_shard_dim(
                config.model.num_experts // meshes.layout.ep,
                config.model.moe_intermediate_size,
                meshes.layout.expert_fsdp,
            )
            assert dim is not None  # check_layout has refused this
            placement = partial(_expert_placement, dim=dim)
            shard(block.ffn.experts, mesh=meshes.expert_fsdp, shard_placement_fn=placement)
        shard(block, mesh=meshes.fsdp)
    for module in stage.model.ends():
        policy = exact if isinstance(module, ImageCondition) else narrow
        shard(module, mesh=meshes.fsdp, mp_policy=policy)
    fully_shard(stage, mesh=meshes.fsdp, mp_policy=exact, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Gloo has no scaled sum, which FSDP2 would use for any other factor.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _expert_placement(parameter: nn.Parameter, *, dim: int) -> Shard:
    """Dim 0, or the expert width: dim 2 of (E, 2, F, D) and of (E, D, F)."""
    return Shard(0 if dim == 0 else 2)


def _kept_exact(block: nn.Module) -> Iterable[nn.Module]:
    """Modules whose parameters are used in fp32 in any precision."""
    return (m for m in block.modules() if isinstance(m, KEPT_EXACT))
