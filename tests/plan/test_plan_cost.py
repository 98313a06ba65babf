"""The cost model: bubbles and times by hand, what must hold for any layout, published runs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tools.ledger import ROOT
from trinity.core.load_config import load_config
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case
from trinity.plan.compute import Machine, busiest_mean_keys, newton_schulz_flops
from trinity.plan.cost import StageTime, step_cost
from trinity.plan.cost import bubble_s as bubble
from trinity.plan.hardware import gpu_names, load_efficiency, load_gpu
from trinity.plan.memory import peak_memory, rank_memory
from trinity.plan.published import published_runs
from trinity.plan.shapes import model_shape

LARGE = load_config(ROOT / "configs/large.toml", ["batch.ramp=[]"])


def _large(layout: Layout, *overrides: str) -> Case:
    config = load_config(ROOT / "configs/large.toml", ["batch.ramp=[]", *overrides])
    return Case(config, model_shape(config.model, config.optim), layout)


def test_hardware_table_is_complete() -> None:
    wanted = {"h100", "h200", "b200", "b300", "h800", "a100", "gb300"}
    assert wanted <= set(gpu_names())
    for name in gpu_names():
        gpu = load_gpu(name)
        for field in dataclasses.fields(gpu):
            value = getattr(gpu, field.name)
            assert value, (name, field.name)
        assert gpu.fp8_flops >= gpu.bf16_flops > gpu.fp32_flops
        assert gpu.nvlink_bandwidth > gpu.rdma_bandwidth
    fractions = dataclasses.asdict(load_efficiency())
    for key in ("gemm_bf16", "gemm_fp8", "attention", "hbm", "nvlink", "rdma", "other"):
        assert 0 < fractions[key] <= 1


def test_ranks_share_a_node_as_far_as_their_distance_allows() -> None:
    h100, rack = load_gpu("h100"), load_gpu("gb300")
    assert h100.members_per_node(size=4, stride=1) == 4
    assert h100.members_per_node(size=128, stride=1) == 8
    assert h100.members_per_node(size=16, stride=4) == 2
    assert h100.members_per_node(size=16, stride=8) == 1
    assert rack.members_per_node(size=128, stride=1) == 64


def test_bubbles() -> None:
    equal = [StageTime(1.0, 2.0, 1.0)] * 4
    assert bubble("1f1b", equal[:1]) == 0
    assert bubble("1f1b", equal) == 3 * 3.0  # (pp - 1) (F + B)
    assert bubble("interleaved_1f1b", equal, stages_per_rank=2) == 4.5
    assert bubble("zbv", equal) == 0  # F = B_input = W
    assert bubble("dualpipev", equal) == 3 * (1 + 2 * 2 - 3) / 2
    # With recompute in the backward even zbv waits.
    assert bubble("zbv", [StageTime(1.0, 3.0, 1.0)] * 4) == 3.0
    # A slow last stage sets the pace; the others' turns are what is waited for.
    assert bubble("1f1b", [StageTime(1.0, 2.0, 1.0), StageTime(2.0, 4.0, 2.0)]) == 3.0


def test_newton_schulz_flops() -> None:
    m = 8
    assert newton_schulz_flops(m, m, 5) == 5 * (4 + 2) * m**3
    # Three restarts of 4 m^2 n; two segments of two polynomials, one product of them and a step of
    # the Gram matrix (two products); one polynomial.
    n = 4 * m
    assert newton_schulz_flops(n, m, 5) == 12 * m * m * n + (2 * 10 + 2) * m**3


def test_keys_of_the_busiest_context_parallel_rank() -> None:
    whole = _large(Layout())
    assert busiest_mean_keys(whole, None) == (8192 + 1) / 2
    assert busiest_mean_keys(whole, 4096) == (4096 * 4097 / 2 + 4096 * 4096) / 8192
    last = _large(Layout(cp=4))
    assert busiest_mean_keys(last, None) == 6144 + (2048 + 1) / 2
    assert busiest_mean_keys(last, 4096) == 4096


def test_thin_products_are_slower() -> None:
    machine = Machine(load_gpu("h200"), load_efficiency())
    half = machine.efficiency.gemm_half_dim
    fast = 2 * 4096.0**3 / (989e12 * machine.efficiency.gemm_bf16)
    assert machine.product_s(4096, 4096, 4096) == pytest.approx(fast * (4096 + half) / 4096)
    assert machine.product_s(4096, 4096, 64) > machine.product_s(4096, 4096, 4096) / 64


LAYOUTS = [
    (Layout(dp_replicate=16, dp_shard=128, ep=8), []),
    (Layout(dp_replicate=16, dp_shard=128, ep=8), ["parallel.reshard_after_forward=false"]),
    (Layout(pp=8, dp_shard=256, ep=8), []),
    (Layout(dp_shard=128, cp=2, tp=8, ep=64), []),
]


@pytest.mark.parametrize(("layout", "overrides"), LAYOUTS)
def test_a_prediction_lies_above_the_bound_and_its_parts_add_up(
    layout: Layout, overrides: list[str]
) -> None:
    case = _large(layout, "batch.microbatch_rows=1", *overrides)
    cost = step_cost(case, load_gpu("b300"))
    assert 0 < cost.bound_s <= cost.step_s
    assert cost.bound_s <= cost.serial_s
    assert min(cost.parts.values()) >= 0
    per_token = sum(cost.microseconds_per_token(part) for part in cost.parts)
    assert per_token == pytest.approx(1e6 / cost.tokens_per_s)
    assert 0 < cost.mfu < 1
    memory = peak_memory(case, load_efficiency())
    assert memory.total == memory.lasting + max(memory.passing, memory.newton_schulz)
    assert min(memory) >= 0


def test_recompute_trades_memory_for_time() -> None:
    layout = Layout(dp_replicate=16, dp_shard=128, ep=8)
    cases = [_large(layout, f"train.recompute={m}") for m in ("none", "selective", "full")]
    saved = [rank_memory(case, load_efficiency()).activations for case in cases]
    times = [step_cost(case, load_gpu("b300")).parts["recompute"] for case in cases]
    assert saved == sorted(saved, reverse=True)
    assert times == sorted(times)
    assert times[0] == 0
    # "full" keeps what enters a block, and what head and loss keep.
    hidden = 2 * 8192 * 3072 * 2
    assert saved[2] == (60 + 3) * hidden


def test_switches_of_the_configuration_count() -> None:
    layout = Layout(dp_shard=128, ep=64)
    gpu = load_gpu("h200")
    plain = step_cost(_large(layout), gpu)
    narrow = step_cost(_large(layout, "train.fp8=rowwise"), gpu)
    assert narrow.parts["products"] < plain.parts["products"]
    deep = step_cost(_large(layout, "parallel.dispatcher=deep_ep"), gpu)
    rdma = [sum(t.rdma_bytes for t in cost.traffic if t.axis == "ep") for cost in (plain, deep)]
    # Of 4 experts, one copy for each of the 8 nodes that have any; weights travel with rows.
    assert rdma[1] / rdma[0] == pytest.approx(8 * (1 - (7 / 8) ** 4) / 4, rel=1e-3)


def test_resident_experts_beat_the_published_layout_of_trinity_large() -> None:
    published = _large(Layout(dp_replicate=16, dp_shard=128, ep=8))
    resident = _large(
        Layout(pp=8, dp_shard=256, ep=8),
        "batch.microbatch_rows=1",
        "parallel.reshard_after_forward=false",
    )
    before, after = (step_cost(case, load_gpu("b300")) for case in (published, resident))
    assert after.tokens_per_s > 1.5 * before.tokens_per_s
    part = "gather and reduce"
    saved = before.microseconds_per_token(part) - after.microseconds_per_token(part)
    assert saved > 100
    # Every gather of experts is gone but one per step.
    assert published.gathers_per_step == 2 * 3
    assert resident.gathers_per_step == resident.reduces_per_step == 1


def test_published_runs_are_predicted_as_well_as_the_page_says() -> None:
    """Errors are printed by tools/plan_check.py; this keeps them from growing unseen."""
    runs = published_runs(ROOT)
    assert len(runs) >= 20
    errors = [abs(run.error) for run in runs]
    assert sum(errors) / len(errors) < 0.25
    # What overlaps entirely cannot be beaten.
    assert max(run.share_of_bound for run in runs) < 1.05
    large = next(run for run in runs if run.name.startswith("Trinity Large"))
    assert abs(large.error) < 0.25
    assert all(run.source and math.isfinite(run.cost.step_s) for run in runs)
