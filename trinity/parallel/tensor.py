"""Tensor parallelism: every rank of a group holds some heads, some hidden units, some words.

The first matrices of a branch are cut by rows (heads, hidden units), the last by columns, so that
one collective in and one out make a branch (Megatron-LM, arXiv 1909.08053). With sequence
parallelism the stream between branches is cut by positions and norms see only a rank's own. The
mixture of experts always works on a rank's own positions, with whole experts: cutting experts as
thin as theirs would leave products too small.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from trinity.models.dit import DiffusionTransformer
from trinity.models.lm import LanguageModel
from trinity.models.staged import StagedModel
from trinity.nn.block import Block
from trinity.nn.modulation import Modulation
from trinity.nn.moe import MoE
from trinity.nn.norm import RMSNorm
from trinity.ops.loss import VocabularyShard
from trinity.parallel.collectives import (
    copy_to_ranks,
    gather_dim,
    join_parts,
    own_part,
    reduce_scatter_dim,
    sum_over_ranks,
)
from trinity.parallel.local import compute_with_local_parameters

POSITIONS = 1
"""The dim of (B, S, D) that sequence parallelism cuts."""

CUT_BY_ROWS = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    *("q_conv", "k_conv", "v_conv", "rates", "skip", "out_norm", "reverse"),
)
"""Rows, or entries, belong to heads or hidden units."""
CUT_BY_COLUMNS = ("o_proj", "down_proj")
USED_BY_EVERY_HEAD = ("q_norm", "k_norm")


def shard_tensors(model: StagedModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Cut the matrices of ``model`` over the one axis of ``mesh`` and put the collectives in place.

    Experts are left as they are (:mod:`trinity.parallel.expert` and FSDP share them out).
    """
    group = mesh.get_group()
    stream = _Stream(group, sequence_parallel)
    # The gradient of a parameter that every rank holds: a sum over ranks if each saw its own
    # positions, the same everywhere if each saw all.
    on_stream = Partial() if sequence_parallel else Replicate()
    for block in model.backbone.layers.values():
        assert isinstance(block, Block)
        for norm in block.children():
            if isinstance(norm, RMSNorm | Modulation):
                _distribute(norm, mesh, Replicate(), on_stream)
        if block.mixer is not None:
            _cut_branch(block.mixer, mesh, stream)
        if isinstance(block.ffn, MoE):
            _place_moe(block.ffn, mesh, stream)
        elif block.ffn is not None:
            _cut_branch(block.ffn, mesh, stream)
    if model.backbone.norm is not None:
        _distribute(model.backbone.norm, mesh, Replicate(), on_stream)
    if isinstance(model, LanguageModel):
        _cut_vocabulary(model, mesh, stream)
    if isinstance(model, DiffusionTransformer):
        _place_image_ends(model, mesh, stream, on_stream)


def _cut_vocabulary(model: LanguageModel, mesh: DeviceMesh, stream: _Stream) -> None:
    if model.embed_tokens is not None:
        _distribute(model.embed_tokens, mesh, Shard(0), Shard(0))
        forward = partial(_embed, model.embed_tokens, stream)
        model.embed_tokens.forward = forward  # type: ignore[assignment]
    if model.backbone.norm is not None:
        model.backbone.norm.register_forward_hook(stream.after_norm)
    if model.lm_head is not None:
        num_words = model.lm_head.weight.shape[0] // mesh.size()
        _distribute(model.lm_head, mesh, Shard(0), Shard(0))
        model.lm_head.shard = VocabularyShard(
            mesh.get_local_rank() * num_words, partial(_gather_stacked, group=stream.group)
        )


def _place_image_ends(
    model: DiffusionTransformer, mesh: DeviceMesh, stream: _Stream, on_stream: Placement
) -> None:
    """Both ends are small: every rank has them whole. The head works on a rank's own positions."""
    for module in (model.patch_embed, model.condition):
        if module is not None:
            _distribute_all(module, mesh, on_stream)
    if model.patch_embed is not None and stream.sequence_parallel:
        model.patch_embed.register_forward_pre_hook(stream.before_own_work)
    if model.patch_head is not None:
        _distribute_all(model.patch_head, mesh, Partial())
        own = stream.before_head if stream.sequence_parallel else stream.before_own_work
        model.patch_head.register_forward_pre_hook(own)


def _distribute_all(module: nn.Module, mesh: DeviceMesh, gradient: Placement) -> None:
    for part in module.modules():
        if any(True for _ in part.parameters(recurse=False)):
            _distribute(part, mesh, Replicate(), gradient)


class _Stream:
    """What happens to the stream between matrices on the way into a branch and out of it."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel

    def enter(self, x_BSD: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_dim(x_BSD, self.group, POSITIONS)
        return copy_to_ranks(x_BSD, self.group)

    def leave(self, x_BSD: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_dim(x_BSD, self.group, POSITIONS)
        return sum_over_ranks(x_BSD, self.group)

    def before_branch(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.enter(args[0]), *args[1:])

    def after_branch(self, _module: nn.Module, _args: Any, out_BSD: Tensor) -> Tensor:
        return self.leave(out_BSD)

    def after_norm(self, _module: nn.Module, _args: Any, out_BSD: Tensor) -> Tensor:
        return self.enter(out_BSD)

    def before_own_work(
        self, _module: nn.Module, args: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Of everything that has positions, this rank's."""
        return tuple(self._own(x) for x in args)

    def before_head(
        self, _module: nn.Module, args: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """The same where the stream, which comes first, is this rank's already."""
        return (args[0], *(self._own(x) for x in args[1:]))

    def _own(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if x.shape[POSITIONS] > 1:
            return own_part(x, self.group, POSITIONS)
        # One for all positions: each rank's own ones give it a part of its gradient.
        return copy_to_ranks(x, self.group) if x.requires_grad else x

    def after_moe(self, _module: nn.Module, _args: Any, out: tuple[Tensor, ...]) -> Any:
        return (join_parts(out[0], self.group, POSITIONS), *out[1:])


def _cut_branch(branch: nn.Module, mesh: DeviceMesh, stream: _Stream) -> None:
    _cut_children(branch, mesh)
    branch.register_forward_pre_hook(stream.before_branch)
    branch.register_forward_hook(stream.after_branch)


def _cut_children(branch: nn.Module, mesh: DeviceMesh) -> None:
    for name, module in branch.named_children():
        if name in CUT_BY_ROWS:
            _distribute(module, mesh, Shard(0), Shard(0))
            _cut_children(module, mesh)  # of a reverse scan, which have the names of the forward's
        elif name in CUT_BY_COLUMNS:
            _distribute(module, mesh, Shard(1), Shard(1))
        else:
            assert name in USED_BY_EVERY_HEAD, f"no rule for {name}"  # every rank: its own heads
            _distribute(module, mesh, Replicate(), Partial())


def _place_moe(moe: MoE, mesh: DeviceMesh, stream: _Stream) -> None:
    _distribute(moe.router, mesh, Replicate(), Partial())
    if moe.shared is not None:
        for linear in moe.shared.children():
            _distribute(linear, mesh, Replicate(), Partial())
    if not stream.sequence_parallel:
        moe.register_forward_pre_hook(stream.before_own_work)
        moe.register_forward_hook(stream.after_moe)


def _distribute(
    module: nn.Module, mesh: DeviceMesh, placement: Placement, gradient: Placement
) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        distributed = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        setattr(module, name, nn.Parameter(distributed))
    compute_with_local_parameters(module, [gradient])


def _embed(embedding: nn.Embedding, stream: _Stream, tokens_BS: Tensor) -> Tensor:
    """Look up the words that are here; the others' rows are zero and come from the peers."""
    weight_VD = embedding.weight
    own_BS = tokens_BS - dist.get_rank(stream.group) * weight_VD.shape[0]
    is_here_BS = (own_BS >= 0) & (own_BS < weight_VD.shape[0])
    rows_BSD = F.embedding(own_BS.where(is_here_BS, 0), weight_VD)
    return stream.leave(rows_BSD * is_here_BS.unsqueeze(-1))


def _gather_stacked(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
    return out
