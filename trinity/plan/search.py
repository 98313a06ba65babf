"""Which layout to use: every one that divides, those that fit, ordered by predicted time.

Searched: pp (1f1b and interleaved), dp_replicate, dp_shard, cp, tp, ep, rows of a microbatch,
whether parameters stay gathered, rows of a loss chunk, recompute. Of the recompute modes only the
lightest that fits is kept: less recompute is never slower. Schedules that split the backward can
be given but are not searched: what splitting costs the blocks has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from trinity.core.config import Config, RunConfig
from trinity.core.errors import ConfigError
from trinity.core.tables import Table
from trinity.parallel.mesh import Layout, check_layout
from trinity.parallel.recompute import RecomputeMode
from trinity.plan.case import Case
from trinity.plan.cost import Cost, step_cost
from trinity.plan.hardware import Gpu, load_efficiency
from trinity.plan.memory import Memory, peak_memory, usable_bytes
from trinity.plan.shapes import ModelShape, model_shape

RECOMPUTE_MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
MAX_PP = 32
MIN_POSITIONS = 2048
"""Positions that context parallelism leaves a rank at least; below, exchanges outweigh the work."""
MAX_MICROBATCH_TOKENS = 65_536
LOSS_CHUNK_ROWS = 4096
"""A chunk for GPUs: the head's gradient is summed once per chunk, in fp32, in HBM."""
GB = 1e9


class Setting(NamedTuple):
    """What a search varies besides the layout."""

    microbatch_rows: int
    reshard_after_forward: bool
    pp_schedule: str
    pp_stages_per_rank: int
    loss_chunk_rows: int
    """0 for images, whose loss is small."""

    @classmethod
    def of(cls, config: RunConfig) -> Setting:
        """As the configuration has it."""
        parallel = config.parallel
        return cls(
            config.batch.microbatch_rows,
            parallel.reshard_after_forward,
            parallel.pp_schedule,
            parallel.pp_stages_per_rank,
            config.loss.chunk_rows if isinstance(config, Config) else 0,
        )


@dataclass(frozen=True)
class Candidate:
    """A layout that works, with what it needs and takes."""

    case: Case
    memory: Memory
    cost: Cost

    @property
    def setting(self) -> Setting:
        """Its keys besides the layout."""
        return Setting.of(self.case.config)

    def __str__(self) -> str:
        """Such as "pp8 x fsdp256 x ep8, 1 row, selective recompute, resident"."""
        setting, layout = self.setting, self.case.layout
        rows = f"{setting.microbatch_rows} row" + ("s" if setting.microbatch_rows > 1 else "")
        parts = [str(layout), rows, f"recompute {self.case.config.train.recompute}"]
        if layout.pp > 1 and setting.pp_stages_per_rank > 1:
            parts.append(f"{setting.pp_schedule} x{setting.pp_stages_per_rank}")
        if layout.world_size > 1:
            parts.append("gathered per use" if setting.reshard_after_forward else "gathered once")
        return ", ".join(parts)


class Rejection(NamedTuple):
    """Why one layout cannot be used."""

    layout: Layout
    setting: Setting
    kind: str
    """does not divide, too few microbatches, or does not fit."""
    reason: str
    missing_bytes: int = 0
    """By how much it exceeds the memory."""


@dataclass
class Rejections:
    """Counts by kind, and of each the case that came nearest to working."""

    counts: dict[str, int] = field(default_factory=dict)
    nearest: dict[str, Rejection] = field(default_factory=dict)

    def add(self, rejection: Rejection, count: int = 1) -> None:
        """Count one more, or several for the same reason."""
        kind = rejection.kind
        self.counts[kind] = self.counts.get(kind, 0) + count
        known = self.nearest.get(kind)
        if known is None or rejection.missing_bytes < known.missing_bytes:
            self.nearest[kind] = rejection


@dataclass(frozen=True)
class Plan:
    """The answer of a search."""

    ranking: list[Candidate]
    """Fastest first."""
    rejections: Rejections
    gpu: Gpu


def apply(config: RunConfig, layout: Layout, setting: Setting) -> RunConfig:
    """The configuration with a layout and a setting, unchecked."""
    parallel = config.parallel.model_copy(
        update={
            "pp": layout.pp,
            "dp_replicate": layout.dp_replicate,
            "dp_shard": layout.dp_shard,
            "cp": layout.cp,
            "tp": layout.tp,
            "ep": layout.ep,
            "pp_schedule": setting.pp_schedule,
            "pp_stages_per_rank": setting.pp_stages_per_rank,
            "reshard_after_forward": setting.reshard_after_forward,
        }
    )
    batch = config.batch.model_copy(update={"microbatch_rows": setting.microbatch_rows})
    tables: dict[str, Table] = {"parallel": parallel, "batch": batch}
    if isinstance(config, Config):
        loss = config.loss.model_copy(update={"chunk_rows": setting.loss_chunk_rows})
        tables["loss"] = loss
    return config.model_copy(update=tables)


def evaluate(
    config: RunConfig, layout: Layout, setting: Setting, gpu: Gpu, shape: ModelShape
) -> Candidate | Rejection:
    """A candidate in the lightest recompute mode that fits, or why there is none."""
    config = apply(config, layout, setting)
    refused = _refused(config, layout, setting)
    if refused is not None:
        return refused
    efficiency, usable = load_efficiency(), usable_bytes(gpu, load_efficiency())
    least: Memory | None = None
    for mode in RECOMPUTE_MODES:
        case = Case(config, shape, layout).with_recompute(mode)
        memory = peak_memory(case, efficiency)
        if memory.total <= usable:
            return Candidate(case, memory, step_cost(case, gpu, efficiency))
        least = memory if least is None or memory.total < least.total else least
        if memory.lasting > usable:
            break
    assert least is not None
    missing = least.total - usable
    parts = sorted(least._asdict().items(), key=lambda part: -part[1])[:2]
    biggest = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    return Rejection(
        layout,
        setting,
        "does not fit",
        f"needs {least.total / GB:.1f} GB of {usable / GB:.1f}, {missing / GB:.1f} too many "
        f"({biggest})",
        missing,
    )


def _refused(config: RunConfig, layout: Layout, setting: Setting) -> Rejection | None:
    """What training would say of it at start-up."""
    try:
        check_layout(config, layout)
    except ConfigError as error:
        kind = "too few microbatches" if "microbatches" in str(error) else "does not divide"
        return Rejection(layout, setting, kind, str(error))
    return None


def search(config: RunConfig, num_gpus: int, gpu: Gpu) -> Plan:
    """All layouts of ``num_gpus``, ranked. Raises ConfigError when none works."""
    shape = model_shape(config.model, config.optim)
    rejections = Rejections()
    ranking: list[Candidate] = []
    for layout in layouts(config, num_gpus, gpu):
        choices = list(settings(config, layout))
        smallest = choices[0]
        refused = _refused(apply(config, layout, smallest), layout, smallest)
        if refused is not None and refused.kind == "does not divide":
            rejections.add(refused, count=len(choices))
            continue
        for setting in choices:
            found = evaluate(config, layout, setting, gpu, shape)
            if isinstance(found, Candidate):
                ranking.append(found)
            else:
                rejections.add(found)
    if not ranking:
        reasons = "; ".join(r.reason for r in rejections.nearest.values()) or "nothing divides"
        raise ConfigError(f"no layout of {num_gpus} {gpu.name} works: {reasons}")
    ranking.sort(key=lambda candidate: candidate.cost.step_s)
    return Plan(ranking, rejections, gpu)


def layouts(config: RunConfig, num_gpus: int, gpu: Gpu) -> Iterator[Layout]:
    """Every way to spread the axes, within limits of good sense.

    Tensor parallelism stays on one node; a pipeline has at most ``MAX_PP`` ranks; a group of
    experts does not span copies of the model.
    """
    model, positions = config.model, config.batch.sequence_length
    has_experts = bool(model.moe_layers)
    for pp in divisors(num_gpus):
        if pp > min(MAX_PP, model.num_hidden_layers):
            break
        for tp in divisors(num_gpus // pp):
            if tp > gpu.num_nvlink_gpus or model.num_key_value_heads % tp:
                continue
            for cp in divisors(num_gpus // (pp * tp)):
                if cp > 1 and positions // cp < MIN_POSITIONS:
                    break
                rest = num_gpus // (pp * tp * cp)
                for dp_shard in divisors(rest):
                    copy = dp_shard * cp * tp
                    for ep in divisors(math.gcd(copy, model.num_experts)) if has_experts else [1]:
                        yield Layout(pp, rest // dp_shard, dp_shard, cp, tp, ep)


def settings(config: RunConfig, layout: Layout) -> Iterator[Setting]:
    """Microbatches, schedules and gathering that make sense with a layout."""
    batch = config.batch
    per_rank = batch.rows_per_step // layout.dp
    positions = batch.sequence_length // layout.cp
    rows = [
        rows
        for rows in divisors(per_rank)
        if rows == 1 or rows * positions <= MAX_MICROBATCH_TOKENS
    ] or [batch.microbatch_rows]
    own = Setting.of(config).loss_chunk_rows
    chunk = max(own, LOSS_CHUNK_ROWS) if own else 0
    for num_rows in rows:
        if layout.pp == 1:
            yield Setting(num_rows, True, "1f1b", 1, chunk)
            if layout.world_size > 1:
                yield Setting(num_rows, False, "1f1b", 1, chunk)
            continue
        # Parameters stay gathered in a pipeline anyway; resharding would only gather them again.
        yield Setting(num_rows, False, "1f1b", 1, chunk)
        for per_stage in (2, 3, 4):
            if layout.pp * per_stage <= config.model.num_hidden_layers:
                yield Setting(num_rows, False, "interleaved_1f1b", per_stage, chunk)


def divisors(number: int) -> list[int]:
    """All divisors, ascending; of 0 none."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0] if number else []
    return small + [number // d for d in reversed(small) if d * d != number]
