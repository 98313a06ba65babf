"""Bytes of parameters, optimizer state and collectives: by hand, and against a real build."""

from __future__ import annotations

import pytest

from tests.plan.plan_cases import (
    assert_counts_of_a_real_build,
    assert_pipeline_rank_as_planned,
    case_of,
    traffic_of,
)
from tools.ledger import HYBRID, ROOT
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.models.flops import train_flops_per_token
from trinity.models.lm import parameter_counts
from trinity.parallel.mesh import Layout
from trinity.plan.cost import model_flops_per_token
from trinity.plan.hardware import load_efficiency
from trinity.plan.memory import optimizer_bytes, part_sizes, rank_memory
from trinity.plan.traffic import Traffic


def _small(*overrides: str) -> Config:
    return load_config(ROOT / "configs/ledger.toml", ["train.precision=bf16", *overrides])


@pytest.mark.parametrize("name", ["tiny", "nano", "large"])
def test_parameters_and_flops_are_those_of_the_model(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.toml")
    case = case_of(config, Layout())
    counts = parameter_counts(config.model)
    biases = config.model.num_experts * (
        config.model.num_hidden_layers - config.model.num_dense_layers
    )
    assert case.shape.num_parameters + biases == counts["total"]
    wanted = train_flops_per_token(config.model, config.batch.sequence_length)
    assert model_flops_per_token(case) == pytest.approx(wanted, rel=1e-12)


def test_flops_of_a_hybrid_are_those_of_the_model() -> None:
    config = _small(*HYBRID)
    wanted = train_flops_per_token(config.model, config.batch.sequence_length)
    assert model_flops_per_token(case_of(config, Layout())) == pytest.approx(wanted, rel=1e-12)


def test_two_layers_on_four_ranks_by_hand() -> None:
    config = _small("model.num_hidden_layers=2", "parallel.ep=2", "batch.rows_per_step=4")
    case = case_of(config, Layout(dp_shard=4, ep=2))
    (part,) = case.parts
    # D 32, 4 heads and 2 key heads of 8: q, gate, o 32 x 32, k and v 16 x 32.
    mixer, norms = 3 * 32 * 32 + 2 * 16 * 32, 4 * 32 + 2 * 8
    dense, shared, router, experts = 3 * 48 * 32, 3 * 16 * 32, 8 * 32, 8 * 3 * 16 * 32
    words = 2 * 512 * 32
    muon = 2 * mixer + dense + shared + router + experts
    adamw = words + 2 * norms + 32
    held = part_sizes(part, case.layout)
    assert held.stored == (muon + adamw) // 4
    assert held.muon == muon // 4
    # One fp32 momentum; two fp32 moments, and a counter for embedding, head and 13 norms.
    assert optimizer_bytes(case, held) == (4 * muon + 8 * adamw) // 4 + 4 * 15
    memory = rank_memory(case, load_efficiency())
    assert memory.weights == memory.gradients == 4 * held.stored
    moved = {(t.kind, t.axis): (t.num_calls, t.num_bytes) for t in traffic_of(case)}
    # In bf16 for the forward and again for the backward; norms and routers once, in fp32. A rank
    # has a quarter of it already. Two blocks, embedding, head; all norms but the last; the last.
    matrices = 2 * mixer + dense + shared + words
    exact = 2 * norms + router + 32
    assert moved["all-gather", "fsdp"] == (8 + 2, (2 * 2 * matrices + 4 * exact) * 3 // 4)
    assert moved["reduce-scatter", "fsdp"] == (4 + 2, 4 * (matrices + exact) * 3 // 4)
    # Half the experts are this rank's and its partner's; half of those it has already.
    assert moved["all-gather", "expert_fsdp"] == (2, 2 * 2 * (experts // 2) // 2)
    # 64 tokens to 2 experts each; a row there and back, forward and backward, half to itself; an
    # fp32 weight there and its gradient back.
    rows = 64 * 2
    assert moved["all-to-all", "ep"] == (6, (4 * rows * 32 * 2 + 2 * rows * 4) // 2)


LAYOUTS = {
    "fsdp x ep": (Layout(dp_shard=4, ep=2), ["parallel.ep=2", "train.recompute=selective"]),
    "hsdp, gathered once": (
        Layout(dp_replicate=2, dp_shard=4, ep=4),
        ["parallel.ep=4", "parallel.dp_replicate=2", "parallel.reshard_after_forward=false"],
    ),
    "tp": (Layout(tp=2, dp_shard=2), ["parallel.tp=2", "train.recompute=full"]),
    "tp without sp": (
        Layout(tp=2, dp_shard=2),
        ["parallel.tp=2", "parallel.sequence_parallel=false"],
    ),
    "experts cut in width": (Layout(dp_shard=16), []),
    "cp": (Layout(cp=2, dp_shard=2, ep=2), ["parallel.cp=2", "parallel.ep=2"]),
    "hybrid, fsdp x ep": (Layout(dp_shard=4, ep=2), ["parallel.ep=2", *HYBRID]),
    "hybrid, cp": (Layout(cp=2, dp_shard=2, ep=2), ["parallel.cp=2", "parallel.ep=2", *HYBRID]),
    "hybrid, tp": (Layout(tp=2, dp_shard=2), ["parallel.tp=2", *HYBRID]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_equal_those_of_a_real_build(name: str) -> None:
    layout, overrides = LAYOUTS[name]
    config = _small(f"batch.rows_per_step={2 * layout.dp}", *overrides)

    def is_counted(entry: Traffic) -> bool:
        # Sums of gradients over tensor-parallel ranks happen inside DTensor, where nobody counts.
        return (entry.axis, entry.kind) != ("tp", "all-reduce") or name == "tp without sp"

    assert_counts_of_a_real_build(config, layout, is_counted)


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_pipeline_ranks_hold_and_move_what_is_planned(reshard: str) -> None:
    layout = Layout(pp=2, dp_shard=2)
    config = _small(
        "parallel.pp=2", "batch.rows_per_step=8", f"parallel.reshard_after_forward={reshard}"
    )
    for pp_rank in range(2):
        assert_pipeline_rank_as_planned(config, layout, pp_rank)


def test_bytes_are_split_between_links_by_where_ranks_stand() -> None:
    config = _small("parallel.ep=4", "batch.rows_per_step=64")
    traffic = {t.purpose: t for t in traffic_of(case_of(config, Layout(dp_shard=64, ep=4)))}
    dispatch = traffic["dispatch"]  # 4 neighbours on one node
    assert dispatch.rdma_bytes == 0
    assert dispatch.nvlink_bytes == pytest.approx(dispatch.num_bytes, rel=1e-3)
    gather = traffic["gather"]
    assert gather.nvlink_bytes + gather.rdma_bytes == pytest.approx(gather.num_bytes, rel=1e-2)
    # 64 ranks on 8 nodes of 8: a card brings 7/64 of what is gathered, neighbours 7/8 of it.
    wide = next(
        t for t in traffic_of(case_of(config, Layout(dp_shard=64, ep=4))) if t.axis == "fsdp"
    )
    assert wide.rdma_bytes / wide.nvlink_bytes == pytest.approx(1 / 8)


def test_context_parallel_halos_by_hand() -> None:
    """Two ranks of 32 positions: 23 of a window of 24, and all 32 for a global layer."""
    config = _small("parallel.cp=2", "batch.rows_per_step=2")
    (entry,) = [t for t in traffic_of(case_of(config, Layout(cp=2, dp_shard=2))) if t.axis == "cp"]
    row = (16 + 16) * 2  # keys and values of 2 heads x 8 in bf16
    windows, globals_ = 3, 2
    forward = (windows * 23 + globals_ * 32) * row
    assert (entry.num_calls, entry.num_bytes) == (2 * 5, 2 * forward)
