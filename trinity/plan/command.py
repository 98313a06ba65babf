"""``trinity plan``: which layout to use, what it costs and why, without the cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from trinity.core.config import Config, RunConfig
from trinity.core.errors import ConfigError
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.load_config import load_any_config
from trinity.parallel.mesh import Layout, check_layout, layout_for
from trinity.plan.case import Case
from trinity.plan.cost import step_cost
from trinity.plan.explain import explain
from trinity.plan.hardware import Gpu, load_efficiency, load_gpu
from trinity.plan.memory import peak_memory, usable_bytes
from trinity.plan.search import Candidate, Plan, Setting, search
from trinity.plan.shapes import model_shape
from trinity.plan.traffic import totals

GB = 1e9
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


def plan_command(
    path: Path,
    overrides: Sequence[str],
    *,
    num_gpus: int,
    gpu_name: str,
    layout: str | None = None,
    top: int = 10,
    json_path: Path | None = None,
) -> None:
    """Search, and print what was found. Raises ConfigError when nothing works."""
    config, gpu = load_any_config(path, overrides), load_gpu(gpu_name)
    start = time.perf_counter()
    # Wide enough for the tables also where there is no terminal, such as in a log.
    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    baseline, objection = _baseline(config, num_gpus, gpu, layout)
    with console.status(f"trying layouts of {num_gpus} {gpu.name}"):
        plan = search(config, num_gpus, gpu)
    seconds = time.perf_counter() - start
    winner = plan.ranking[0]
    # Nothing to compare with: the winner stands beside itself.
    baseline = baseline or winner
    console.print(_title(config, num_gpus, gpu, plan, seconds))
    console.print(ranking_table(plan, top))
    console.print(_time_table(winner, baseline))
    console.print(_memory_table(winner, baseline, gpu))
    if num_gpus > 1:
        console.print(_traffic_table(winner, baseline))
    if plan.rejections.counts:
        console.print(_rejection_table(plan))
    if objection:
        console.print(f"The layout compared with is refused: {objection}", markup=False)
    console.print(explain(winner, baseline, plan.ranking), markup=False)
    typer.echo("\n" + parallel_toml(winner))
    if json_path is not None:
        records = [as_record(candidate) for candidate in plan.ranking[:top]]
        answer = {"gpu": gpu.name, "ranking": records, "baseline": as_record(baseline)}
        json_path.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {json_path}")


def parse_layout(text: str, num_gpus: int) -> Layout:
    """A layout from "dp_replicate=16,dp_shard=128,ep=8"; ``dp_shard`` takes what is left.

    Raises ConfigError for an unknown axis or axes that do not multiply to ``num_gpus``.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, value = item.strip().partition("=")
        if axis not in AXES or not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"--layout {text!r}: {item.strip()!r} is not AXIS=NUMBER with one of the axes "
                f"{', '.join(AXES)}"
            )
        sizes[axis] = int(value)
    if "dp_shard" not in sizes:
        others = Layout(**sizes).world_size
        sizes["dp_shard"] = max(1, num_gpus // others)
    layout = Layout(**sizes)
    if layout.world_size != num_gpus:
        raise ConfigError(
            f"--layout {text!r} is a job of {layout.world_size} ranks, not of --gpus {num_gpus}; "
            "change an axis"
        )
    return layout


def _baseline(
    config: RunConfig, num_gpus: int, gpu: Gpu, text: str | None
) -> tuple[Candidate | None, str | None]:
    """The given layout, or that of the configuration; everything else as configured.

    The second result says why it would not train, if so; it is compared with all the same, unless
    it makes no sense at all. Raises ConfigError for a given layout that makes none.
    """
    try:
        layout = parse_layout(text, num_gpus) if text else layout_for(config.parallel, num_gpus)
    except ConfigError as error:
        if text:
            raise
        return None, str(error)
    axes = {axis: getattr(layout, axis) for axis in AXES}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=axes)})
    case = Case(config, model_shape(config.model, config.optim), layout)
    objection = None
    try:
        check_layout(config, layout)
    except ConfigError as error:
        objection = str(error)
    if not case.num_microbatches:
        return None, objection
    memory = peak_memory(case, load_efficiency())
    usable = usable_bytes(gpu, load_efficiency())
    if objection is None and memory.total > usable:
        objection = f"it needs {memory.total / GB:.0f} GB, and {usable / GB:.0f} can be used"
    return Candidate(case, memory, step_cost(case, gpu)), objection


def parallel_toml(candidate: Candidate) -> str:
    """The tables to paste into a configuration."""
    config = candidate.case.config
    parallel: dict[str, Any] = {axis: getattr(config.parallel, axis) for axis in AXES}
    if config.parallel.pp > 1:
        parallel["pp_schedule"] = config.parallel.pp_schedule
        parallel["pp_stages_per_rank"] = config.parallel.pp_stages_per_rank
    parallel["reshard_after_forward"] = config.parallel.reshard_after_forward
    tables = {
        "parallel": parallel,
        "batch": {"microbatch_rows": config.batch.microbatch_rows},
        "train": {"recompute": config.train.recompute},
    }
    if isinstance(config, Config):
        tables["loss"] = {"chunk_rows": config.loss.chunk_rows}
    return tomli_w.dumps(tables)


def as_record(candidate: Candidate) -> dict[str, Any]:
    """Everything known of a candidate, as plain values: seconds, bytes, tokens per second."""
    cost = candidate.cost
    return {
        "layout": {axis: getattr(candidate.case.layout, axis) for axis in AXES},
        "setting": candidate.setting._asdict(),
        "recompute": candidate.case.config.train.recompute,
        "tokens_per_s_per_gpu": cost.tokens_per_s,
        "bound_tokens_per_s_per_gpu": cost.bound_tokens_per_s,
        "mfu": cost.mfu,
        "step_s": cost.step_s,
        "bound_s": cost.bound_s,
        "serial_s": cost.serial_s,
        "seconds_by_part": cost.parts,
        "memory_bytes": {**candidate.memory._asdict(), "total": candidate.memory.total},
        "traffic": [entry._asdict() for entry in cost.traffic],
    }


def _title(config: RunConfig, num_gpus: int, gpu: Gpu, plan: Plan, seconds: float) -> str:
    considered = len(plan.ranking) + sum(plan.rejections.counts.values())
    batch, images = config.batch, ""
    if isinstance(config, ImageRunConfig):
        images = f", images of {config.tokens_of_image} at scale 1"
    return (
        f"{config.name} on {num_gpus} {gpu.name}: {batch.rows_per_step} rows of "
        f"{batch.sequence_length} tokens per step{images}; {considered:,} plans considered, "
        f"{len(plan.ranking):,} fit, in {seconds:.0f} s"
    )


def ranking_table(plan: Plan, top: int) -> Table:
    """The fastest plans, each layout once with its best setting."""
    table = Table(title="fastest layouts (each with its best setting)")
    for heading in ("layout", "rows", "schedule", "recompute", "gathered"):
        table.add_column(heading)
    for heading in ("GB", "tok/s/GPU", "bound", "MFU", "step s", "bubble"):
        table.add_column(heading, justify="right")
    seen: set[Layout] = set()
    for candidate in plan.ranking:
        layout, cost = candidate.case.layout, candidate.cost
        if layout in seen:
            continue
        seen.add(layout)
        setting = candidate.setting
        virtual = f" x{setting.pp_stages_per_rank}" if setting.pp_stages_per_rank > 1 else ""
        table.add_row(
            str(layout),
            str(setting.microbatch_rows),
            setting.pp_schedule + virtual if layout.pp > 1 else "",
            candidate.case.config.train.recompute,
            "" if layout.world_size == 1 else _gathering(setting),
            f"{candidate.memory.total / GB:.0f}",
            f"{cost.tokens_per_s:,.0f}",
            f"{cost.bound_tokens_per_s:,.0f}",
            f"{cost.mfu:.1%}",
            f"{cost.step_s:.2f}",
            f"{cost.parts['bubble'] / cost.step_s:.1%}",
        )
        if len(seen) == top:
            break
    return table


def _gathering(setting: Setting) -> str:
    return "per use" if setting.reshard_after_forward else "once"


def _compare(title: str, winner: Candidate, baseline: Candidate) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column(str(winner.case.layout), justify="right")
    table.add_column(f"{baseline.case.layout} (compared with)", justify="right")
    return table


def _time_table(winner: Candidate, baseline: Candidate) -> Table:
    table = _compare("GPU-microseconds per token", winner, baseline)
    for part in winner.cost.parts:
        pair = [c.cost.microseconds_per_token(part) for c in (winner, baseline)]
        if max(pair) > 0:
            table.add_row(part, *(f"{value:.1f}" for value in pair))
    table.add_section()
    costs = (winner.cost, baseline.cost)
    table.add_row("sum", *(f"{1e6 / cost.tokens_per_s:.1f}" for cost in costs))
    table.add_row("tokens/s/GPU", *(f"{cost.tokens_per_s:,.0f}" for cost in costs))
    config = winner.case.config
    if isinstance(config, ImageRunConfig):
        size = config.tokens_of_image
        table.add_row("images/s/GPU", *(f"{cost.tokens_per_s / size:,.1f}" for cost in costs))
    table.add_row(
        "all overlapped / none",
        *(
            f"{cost.bound_tokens_per_s:,.0f} / {cost.tokens / cost.world_size / cost.serial_s:,.0f}"
            for cost in costs
        ),
    )
    table.add_row("MFU", *(f"{cost.mfu:.1%}" for cost in costs))
    return table


def _memory_table(winner: Candidate, baseline: Candidate, gpu: Gpu) -> Table:
    usable = usable_bytes(gpu, load_efficiency()) / GB
    table = _compare(f"GB on the fullest rank, {usable:.0f} can be used", winner, baseline)
    for name in winner.memory._fields:
        pair = [getattr(c.memory, name) / GB for c in (winner, baseline)]
        table.add_row(name.replace("_", " "), *(f"{value:.1f}" for value in pair))
    table.add_section()
    table.add_row("peak", *(f"{c.memory.total / GB:.1f}" for c in (winner, baseline)))
    return table


def _traffic_table(winner: Candidate, baseline: Candidate) -> Table:
    table = _compare("GB received per GPU and step: NVLink + RDMA (calls)", winner, baseline)
    sums = [totals(list(c.cost.traffic), lambda entry: entry.purpose) for c in (winner, baseline)]
    for purpose in dict.fromkeys([*sums[0], *sums[1]]):
        cells = []
        for candidate, by_purpose in zip((winner, baseline), sums, strict=True):
            nvlink, rdma = by_purpose.get(purpose, (0.0, 0.0))
            calls = sum(e.num_calls for e in candidate.cost.traffic if e.purpose == purpose)
            cells.append(f"{nvlink / GB:,.1f} + {rdma / GB:,.1f} ({calls:,})" if calls else "")
        table.add_row(purpose, *cells)
    return table


def _rejection_table(plan: Plan) -> Table:
    table = Table(title="plans that cannot be used")
    table.add_column("plans", justify="right")
    table.add_column("why")
    table.add_column("the nearest to working", overflow="fold")
    for kind, count in sorted(plan.rejections.counts.items()):
        nearest = plan.rejections.nearest[kind]
        table.add_row(f"{count:,}", kind, f"{nearest.layout}: {nearest.reason}")
    return table
