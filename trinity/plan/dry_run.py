"""One training step of one rank of a job of any size, on this machine, without memory or network.

The model is built and cut by the same code as in training, on fake tensors and a fake process
group, so what is counted is what the job will do: parameters on the rank, and calls and bytes of
every collective. Assumed, because they depend on data: routing is balanced; attention and the
vocabulary loss are stand-ins of the right shapes, which changes nothing that travels.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trinity.core.batch import AnyBatch, Batch, FlowBatch
from trinity.core.config import RunConfig
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.runtime import forget_meshes
from trinity.core.sharding import local_tensor
from trinity.nn import attention, head, linear_mixer, scan_mixer
from trinity.ops.loss import VocabLoss
from trinity.ops.scan import Scanned, empty_state
from trinity.optim.groups import build_optimizers
from trinity.parallel import expert
from trinity.parallel.mesh import Layout, Meshes
from trinity.parallel.model import ParallelModel
from trinity.parallel.plan import shape_stages
from trinity.parallel.stage import StepCounts


class Traffic(NamedTuple):
    """What one kind of collective did on one rank."""

    num_calls: int
    num_bytes: int
    """That other ranks sent to this one, of a ring or a direct exchange: (N-1)/N of a gather's
    result, of a reduction's or an exchange's input, twice that of an all-reduce's."""


class DryRun(NamedTuple):
    """What one rank holds and moves in a step."""

    num_parameters: int
    """Elements of the parameters' shards."""
    num_expert_parameters: int
    """Those of routed experts among them."""
    optimizer_bytes: int
    """State of both optimizers."""
    traffic: dict[tuple[str, str], Traffic]
    """By (collective, axis)."""


def dry_run(config: RunConfig, layout: Layout, rank: int = 0) -> DryRun:
    """A whole optimizer step, as ``rank`` would run it.

    Point-to-point transfers of a pipeline are left out: their size is that of the hidden states.
    Must not be called where a process group exists.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        meshes = Meshes(layout, "cpu")
        # Fake tensors come in after the meshes, which need real ones.
        stages = shape_stages(config, meshes)
        with FakeTensorMode(allow_non_fake_inputs=True), _stand_ins(layout):
            for stage in stages:
                stage.to_empty(device="cpu")
            model = ParallelModel(stages, config, meshes, torch.device("cpu"))
            optimizers = build_optimizers(
                model.named_parameters(), config.optim, model.group_of_axes
            )
            counter = _TrafficCounter(_axis_of_groups(meshes))
            with counter:
                _forward_backward(model)
                optimizers.step()
            optimizer_bytes = optimizers.state_bytes()
        return DryRun(
            sum(local_tensor(p).numel() for p in model.parameters()),
            sum(
                local_tensor(p).numel()
                for name, p in model.named_parameters()
                if ".experts." in name
            ),
            optimizer_bytes,
            {key: Traffic(*value) for key, value in sorted(counter.traffic.items())},
        )
    finally:
        dist.destroy_process_group()
        forget_meshes()


def _forward_backward(model: ParallelModel) -> None:
    config, layout = model.config, model.layout
    num_microbatches = config.batch.rows_per_step // (layout.dp * config.batch.microbatch_rows)
    batch = model.local_batch(_batch_of_shapes(config))
    given = dict(zip(batch._fields[1:], batch[1:], strict=True))
    if layout.pp == 1:
        model.pipeline.forward_backward([batch] * num_microbatches, StepCounts(1, 1))
        return
    for stage in model.stages:
        assert isinstance(stage, FSDPModule)
        for number in range(num_microbatches):
            # What a pipeline schedule does with each stage: reduce after the last microbatch.
            last = number + 1 == num_microbatches
            stage.set_is_last_backward(last)
            stage.set_reshard_after_backward(last)
            stage.set_requires_gradient_sync(last)
            x = batch[0] if stage.index == 0 else _hidden_like(model, batch)
            stage(x, **given).sum().backward()


def _batch_of_shapes(config: RunConfig) -> AnyBatch:
    """One microbatch, of nothing."""
    shape = (config.batch.microbatch_rows, config.batch.sequence_length)
    whole_BS = torch.zeros(shape, dtype=torch.int64)
    if not isinstance(config, ImageRunConfig):
        return Batch(whole_BS, torch.zeros_like(whole_BS), whole_BS.int())
    model, num_images = config.model, config.images_per_row
    patches_BSP = torch.zeros(*shape, model.patch_values[-1])
    of_images_BN = torch.zeros(shape[0], num_images, dtype=torch.int64)
    condition = of_images_BN
    if model.condition == "embedding":
        condition = torch.zeros(shape[0], num_images, model.embedding_width)
    return FlowBatch(
        patches_BSP=patches_BSP,
        targets_BSP=torch.zeros_like(patches_BSP),
        share_BS=torch.zeros(shape),
        weight_BS=torch.zeros(shape),
        scale_BS=whole_BS,
        coordinates_BSA=torch.zeros(*shape, model.num_axes),
        document_ids_BS=whole_BS.int(),
        sigma_BN=of_images_BN.float(),
        condition=condition,
        counts_BN=of_images_BN,
    )


def _hidden_like(model: ParallelModel, batch: AnyBatch) -> Tensor:
    rows, positions = batch[0].shape[:2]
    staged = model.stages[0].model
    num_images = batch.sigma_BN.shape[1] if isinstance(batch, FlowBatch) else 0
    positions //= staged.backbone.row_part.stream_split
    positions += staged.num_extra_positions(num_images)
    width = model.config.model.hidden_size
    return torch.zeros(rows, positions, width, dtype=torch.bfloat16).requires_grad_()


def _axis_of_groups(meshes: Meshes) -> dict[str, str]:
    """Process group name to the axis it runs along."""
    names = {}
    for mesh, axes in (
        (meshes.rows, ("cp",)),
        (meshes.dense, ("tp", "fsdp", "dp_replicate")),
        (meshes.sparse, ("ep", "expert_fsdp")),
    ):
        for axis in axes:
            names.setdefault(mesh.get_group(axis).group_name, axis)
    names[meshes.sparse.get_group("dp_replicate").group_name] = "dp_replicate"
    names.setdefault(meshes.fsdp_and_tp.group_name, "fsdp x tp")
    names[meshes.row_parts.get_group().group_name] = "row parts"
    return names


class _TrafficCounter(TorchDispatchMode):
    """Adds up what collectives receive, by kind and axis."""

    def __init__(self, axis_of_groups: dict[str, str]) -> None:
        super().__init__()
        self.axis_of_groups = axis_of_groups
        self.traffic: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._count(op.name().removeprefix("c10d::").split(".")[0], args)
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name not in _RECEIVED:
            return
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
        )
        size = group.size()
        kind, measured, factor = _RECEIVED[name]
        tensors = args[measured] if isinstance(args[measured], list) else [args[measured]]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        entry = self.traffic[kind, self.axis_of_groups.get(group.group_name, "world")]
        entry[0] += 1
        entry[1] += num_bytes * factor * (size - 1) // size


# Collective: (name for people, which argument is measured, how often it travels).
_RECEIVED = {
    "_allgather_base_": ("all-gather", 0, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "allreduce_": ("all-reduce", 0, 2),
    "alltoall_base_": ("all-to-all", 0, 1),
}


@contextlib.contextmanager
def _stand_ins(layout: Layout) -> Iterator[None]:
    """Replace what looks at values, which fake tensors do not have."""
    with (
        mock.patch.object(attention, "causal_attention", _attention_of_shapes),
        mock.patch.object(attention, "image_attention", _attention_of_shapes),
        mock.patch.object(linear_mixer, "forgetting_attention", _forgetting_of_shapes),
        mock.patch.object(scan_mixer, "scan", _scan_of_shapes),
        mock.patch.object(scan_mixer, "final_state", _state_of_shapes),
        mock.patch.object(head, "linear_cross_entropy", _loss_of_shapes),
        mock.patch.object(expert, "exchange_counts", _balanced_counts),
        mock.patch("trinity.nn.feedforward.expert_ffn", _experts_of_shapes),
        mock.patch.object(expert, "local_expert", _first_expert),
    ):
        yield


def _attention_of_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q + (k.sum() + v.sum())


def _forgetting_of_shapes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **_: Any) -> Tensor:
    return q + (k.sum() + v.sum() + log_decay.sum()).to(q.dtype)


def _scan_of_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    **_: Any,
) -> Scanned:
    rest = q.sum() + k.sum() + log_decay.sum()
    if initial_state is not None:
        rest = rest + initial_state.sum()
    out = v + rest.to(v.dtype)
    return Scanned(out.repeat_interleave(max(1, q.shape[2] // v.shape[2]), dim=2), out)


def _state_of_shapes(k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Tensor:
    zeros = empty_state(k, v, power=options["power"], normalize=options["normalize"])
    return zeros + (k.sum() + v.sum() + log_decay.sum())


def _loss_of_shapes(x_TD: Tensor, weight_VD: Tensor, *_: Any, **__: Any) -> VocabLoss:
    total = x_TD.float().sum() + weight_VD.float().sum()
    return VocabLoss(total, total.detach(), total.detach())


def _experts_of_shapes(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, _index: Tensor, weight_TK: Tensor, **__: Any
) -> Tensor:
    scale = gate_up.float().sum() + down.float().sum() + weight_TK.sum()
    return (x_TD * scale).to(x_TD.dtype)


def _balanced_counts(
    expert_R: Tensor, num_ranks: int, experts_per_rank: int, _group: dist.ProcessGroup
) -> tuple[list[int], list[int], Tensor]:
    share = len(expert_R) // num_ranks
    return [share] * num_ranks, [share] * num_ranks, expert_R[:0]


def _first_expert(_arriving: Tensor, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.int64)
