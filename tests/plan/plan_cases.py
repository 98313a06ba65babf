"""What tests of plans have in common: a plan's parts, and its counts against a real build."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from trinity.core.config import RunConfig
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case
from trinity.plan.dry_run import DryRun, dry_run
from trinity.plan.dry_run import Traffic as CountedTraffic
from trinity.plan.hardware import load_gpu
from trinity.plan.memory import optimizer_bytes, part_sizes
from trinity.plan.shapes import model_shape
from trinity.plan.traffic import Traffic, step_traffic

# What dry_run does not count: transfers between stages; sums over ranks inside DTensor; the sums of
# the balance loss, which are a few numbers.
UNCOUNTED = {("send", "pp"), ("all-reduce", "row parts")}


def case_of(config: RunConfig, layout: Layout) -> Case:
    """What a plan is made from."""
    return Case(config, model_shape(config.model, config.optim), layout)


def traffic_of(case: Case, pp_rank: int = 0) -> list[Traffic]:
    """What a rank of a stage sends and receives in a step."""
    return step_traffic(case, load_gpu("h100"), case.parts[pp_rank])


def by_kind(traffic: Mapping[tuple[str, str], CountedTraffic]) -> dict[str, list[int]]:
    """Groups with the same ranks share a name in the dry run, so axes cannot be told apart."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for key, (calls, num_bytes) in traffic.items():
        if key not in UNCOUNTED:
            sums[key[0]][0] += calls
            sums[key[0]][1] += num_bytes
    return sums


def assert_holds_as_planned(case: Case, pp_rank: int, real: DryRun) -> None:
    """Parameters and optimizer state of a rank."""
    held = part_sizes(case.parts[pp_rank], case.layout)
    assert held.stored == real.num_parameters
    assert optimizer_bytes(case, held) == real.optimizer_bytes


def assert_counts_of_a_real_build(
    config: RunConfig, layout: Layout, is_counted: Callable[[Traffic], bool] = lambda _: True
) -> None:
    """What the first rank holds and moves; ``is_counted`` tells what a dry run sees of a plan."""
    case, real = case_of(config, layout), dry_run(config, layout)
    assert_holds_as_planned(case, 0, real)
    counted, planned = by_kind(real.traffic), defaultdict(lambda: [0, 0])
    for entry in traffic_of(case):
        # Muon gives some ranks more matrices than others, the plan is their mean (test_dry_run).
        if entry.purpose != "muon" and is_counted(entry):
            planned[entry.kind][0] += entry.num_calls
            planned[entry.kind][1] += entry.num_bytes
    for kind in ("all-gather", "reduce-scatter"):
        assert counted[kind] == planned[kind], kind
    if layout.ep > 1 and layout.cp == 1:
        key = ("all-to-all", "ep")
        assert [tuple(real.traffic[key])] == [
            (t.num_calls, t.num_bytes) for t in traffic_of(case) if t.purpose == "dispatch"
        ]
    if layout.dp_replicate > 1:
        assert counted["all-reduce"] == planned["all-reduce"]


def assert_pipeline_rank_as_planned(config: RunConfig, layout: Layout, pp_rank: int) -> None:
    """What a rank of one of two stages holds and moves, FSDP over two ranks."""
    case, real = case_of(config, layout), dry_run(config, layout, 2 * pp_rank)
    assert_holds_as_planned(case, pp_rank, real)
    moved = {(t.kind, t.axis): t for t in traffic_of(case, pp_rank)}
    for kind, axis in (
        ("all-gather", "expert_fsdp"),
        ("reduce-scatter", "expert_fsdp"),
        ("reduce-scatter", "fsdp"),
    ):
        entry = moved[kind, axis]
        assert tuple(real.traffic[kind, axis]) == (entry.num_calls, entry.num_bytes)
    # FSDP2 may prefetch one block in vain after the last backward.
    extra = real.traffic["all-gather", "fsdp"].num_calls - moved["all-gather", "fsdp"].num_calls
    assert extra in (0, 1)
