"""All axis arithmetic of a job: what each rank is, which ranks form which group.

Ranks are numbered with the pipeline outermost and the tensor axis innermost, so that neighbours in
the numbering, which share a node, are neighbours on the axes that talk most:

    rank = (((pp * dp_replicate + r) * dp_shard + s) * cp + c) * tp + t

Parameters outside the experts are sharded over ``fsdp`` = dp_shard x cp, because context-parallel
ranks hold the same parameters and see different tokens. Experts are cut over ``ep``, consecutive
ranks of dp_shard x cp x tp, and sharded over ``expert_fsdp``, what is left of that block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trinity.core.config import ParallelConfig, RunConfig
from trinity.core.errors import ConfigError
from trinity.core.model_config import PRESETS, BackboneConfig, ModelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes; their product is the world."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks that hold the same layers."""
        return self.dp_replicate * self.copy_size

    @property
    def copy_size(self) -> int:
        """Ranks that hold one copy of those layers together."""
        return self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks, or groups of them, that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Shards of a parameter outside the experts."""
        return self.dp_shard * self.cp

    @property
    def expert_fsdp(self) -> int:
        """Shards of an expert stack, on top of ``ep``."""
        return self.copy_size // self.ep

    def __str__(self) -> str:
        """The axes that are more than one rank wide, such as "pp2 x fsdp2 x ep2"."""
        replicated = f"hsdp{self.dp_replicate}x{self.dp_shard}" if self.dp_replicate > 1 else ""
        sharded = f"fsdp{self.dp_shard}" if self.dp_shard > 1 and not replicated else ""
        axes = [(f"pp{self.pp}", self.pp), (f"cp{self.cp}", self.cp), (f"tp{self.tp}", self.tp)]
        parts = [name for name, size in axes if size > 1]
        parts[1 if self.pp > 1 else 0 : 0] = [part for part in (replicated, sharded) if part]
        return " x ".join([*parts, *([f"ep{self.ep}"] if self.ep > 1 else [])]) or "single"

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands on each axis."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        rank, shard = divmod(rank, self.dp_shard)
        pp, replica = divmod(rank, self.dp_replicate)
        in_copy = (shard * self.cp + cp) * self.tp + tp
        return Coordinates(pp, replica, shard, cp, tp, ep=in_copy % self.ep)

    def dp_rank(self, rank: int) -> int:
        """Which share of the rows ``rank`` reads, 0 .. dp - 1."""
        at = self.coordinates(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int


def layout_for(config: ParallelConfig, world_size: int) -> Layout:
    """The layout of ``world_size`` ranks; fills in ``dp_shard = 0``.

    Raises ConfigError when the axes do not multiply to the world size.
    """
    others = config.pp * config.dp_replicate * config.cp * config.tp
    dp_shard = config.dp_shard or max(1, world_size // others)
    layout = Layout(config.pp, config.dp_replicate, dp_shard, config.cp, config.tp, config.ep)
    if layout.world_size != world_size:
        raise ConfigError(
            f"[parallel] pp={config.pp} x dp_replicate={config.dp_replicate} x "
            f"dp_shard={dp_shard} x cp={config.cp} x tp={config.tp} = {layout.world_size}, but the "
            f"job has {world_size} ranks; change an axis, or start {layout.world_size} ranks"
        )
    return layout


def check_layout(config: RunConfig, layout: Layout) -> None:
    """Refuse what cannot be divided, with the remedy, before anything is built.

    Raises ConfigError.
    """
    model, batch = config.model, config.batch
    num_stages = layout.pp * config.parallel.pp_stages_per_rank
    for name, value in _cut_over_tp(model).items():
        _require_divides("parallel.tp", layout.tp, f"model.{name}", value)
    _require_divides(
        "parallel.cp x parallel.tp",
        layout.cp * layout.tp,
        "batch.sequence_length",
        batch.sequence_length,
    )
    _check_convolutions(model, batch.sequence_length // layout.cp)
    _require_divides("parallel.ep", layout.ep, "parallel.dp_shard x cp x tp", layout.copy_size)
    if model.moe_layers:
        _require_divides("parallel.ep", layout.ep, "model.num_experts", model.num_experts)
        _check_expert_shards(config, layout)
    for rows in (batch.rows_per_step, *(point.rows_per_step for point in batch.ramp)):
        _require_divides(
            "parallel.dp_replicate x dp_shard x batch.microbatch_rows",
            layout.dp * batch.microbatch_rows,
            "batch.rows_per_step",
            rows,
        )
        num_microbatches = rows // (layout.dp * batch.microbatch_rows)
        if layout.pp > 1 and num_microbatches < num_stages:
            raise ConfigError(
                f"a pipeline of {num_stages} stages needs at least as many microbatches per step, "
                f"there are {num_microbatches}; raise batch.rows_per_step={rows} or lower "
                f"batch.microbatch_rows={batch.microbatch_rows}"
            )
        rounds = max(1, num_microbatches // layout.pp)
        if config.parallel.pp_schedule == "interleaved_1f1b" and num_microbatches % rounds:
            raise ConfigError(
                f"the interleaved schedule needs a number of microbatches that is a multiple of "
                f"its {rounds} rounds, there are {num_microbatches}; change "
                f"batch.rows_per_step={rows}"
            )
    if layout.pp > 1 and model.num_hidden_layers < num_stages:
        raise ConfigError(
            f"parallel.pp={layout.pp} with {config.parallel.pp_stages_per_rank} stages per rank "
            f"needs at least {num_stages} layers; model.num_hidden_layers="
            f"{model.num_hidden_layers}"
        )


def _cut_over_tp(model: BackboneConfig) -> dict[str, int]:
    """What tensor parallelism divides, of the layers that there are."""
    divided = {"intermediate_size": model.intermediate_size}
    if isinstance(model, ModelConfig):
        divided["vocab_size"] = model.vocab_size
    kinds = set(model.layer_types)
    if kinds & {"sliding_attention", "full_attention"}:
        divided["num_attention_heads"] = model.num_attention_heads
        divided["num_key_value_heads"] = model.num_key_value_heads
    if "mamba2" in kinds:
        divided["mamba2.num_heads"] = model.mamba2_heads
        divided["mamba2.num_groups"] = model.mamba2.num_groups
    for kind in kinds & PRESETS.keys():
        divided["linear.num_heads"], divided["linear.num_kv_heads"] = model.linear_heads
        if model.linear.options(kind).norm == "rms":
            divided["linear.norm_groups"] = model.linear.norm_groups
    return divided


def _check_convolutions(model: BackboneConfig, part: int) -> None:
    """A convolution may read back into the part before, not beyond it."""
    kinds = set(model.layer_types)
    widths = {"mamba2.conv_width": model.mamba2.conv_width if "mamba2" in kinds else 1}
    widths["linear.conv_width"] = model.linear.conv_width if kinds & PRESETS.keys() else 1
    for name, width in widths.items():
        if width - 1 > part:
            raise ConfigError(
                f"model.{name}={width} reads {width - 1} tokens back, parallel.cp leaves parts of "
                f"{part} tokens; lower parallel.cp"
            )


def expert_shard_dim(num_local_experts: int, expert_width: int, shards: int) -> int | None:
    """The dim of an expert stack that FSDP cuts: 0 (whole experts), else the expert width (-2).

    FSDP pads dim 0 up to a multiple of the shards, and gathers the padding: with 32 experts on 128
    ranks, 4 times the bytes. Whole experts also let Muon work without any exchange. None: neither
    can be divided evenly.
    """
    if num_local_experts % shards == 0:
        return 0
    return -2 if expert_width % shards == 0 else None


def _check_expert_shards(config: RunConfig, layout: Layout) -> None:
    local = config.model.num_experts // layout.ep
    width = config.model.moe_intermediate_size
    if expert_shard_dim(local, width, layout.expert_fsdp) is None:
        raise ConfigError(
            f"{local} experts of width {width} per expert-parallel rank cannot be sharded evenly "
            f"over {layout.expert_fsdp} ranks; raise parallel.ep or choose another "
            "parallel.dp_replicate"
        )


def _require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{name}={value} is not a multiple of {divisor_name}={divisor}; change either"
        )


class Meshes:
    """The device meshes of a layout, and this rank's place in them.

    Several meshes over the same ranks: parameters outside the experts live on ``dense`` (pp,
    dp_replicate, fsdp, tp), experts on ``sparse`` (pp, dp_replicate, expert_fsdp, ep), the state
    of the data on ``data`` (pp, dp, row_parts); ``rows`` (all else, cp, tp) says who shares rows.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        self.layout = layout
        self.rank = dist.get_rank()
        self.at = layout.coordinates(self.rank)
        a = layout

        def mesh(sizes: dict[str, int]) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        self.dense = mesh({"pp": a.pp, "dp_replicate": a.dp_replicate, "fsdp": a.fsdp, "tp": a.tp})
        self.sparse = mesh(
            {
                "pp": a.pp,
                "dp_replicate": a.dp_replicate,
                "expert_fsdp": a.expert_fsdp,
                "ep": a.ep,
            }
        )
        self.rows = mesh({"others": a.pp * a.dp, "cp": a.cp, "tp": a.tp})
        self.data = mesh({"pp": a.pp, "dp": a.dp, "row_parts": a.cp * a.tp})
        self.row_parts = self.data["row_parts"]
        self.fsdp_and_tp = mesh(
            {"others": a.pp * a.dp_replicate, "fsdp_and_tp": a.fsdp * a.tp}
        ).get_group("fsdp_and_tp")
        """Ranks among which a matrix cut over both axes is spread, in mesh order."""

    @property
    def fsdp(self) -> DeviceMesh:
        """Where parameters outside the experts are sharded, and replicated under HSDP."""
        return self._with_replicas(self.dense, "fsdp")

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """The same for the experts of one expert-parallel rank."""
        return self._with_replicas(self.sparse, "expert_fsdp")

    def group_along(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """The process group along one axis of the dense or the sparse mesh, or fsdp and tp."""
        if axes == ("fsdp", "tp"):
            return self.fsdp_and_tp
        (axis,) = axes
        return (self.sparse if axis in ("expert_fsdp", "ep") else self.dense).get_group(axis)

    def _with_replicas(self, mesh: DeviceMesh, shards: str) -> DeviceMesh:
        return mesh["dp_replicate", shards] if self.layout.dp_replicate > 1 else mesh[shards]
