"""What one rank of a job moves: counted on the real code, against the least a layout needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.ledger import ROOT, run_layout
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel
from trinity.parallel.mesh import Layout
from trinity.plan.dry_run import Traffic, dry_run

BF16, FP32 = 2, 4


def _elements(config: Config) -> tuple[int, int, int]:
    """Parameters of routed experts, of norms and routers, and all others."""
    experts = exact = others = 0
    for name, parameter in LanguageModel.on_meta(config.model).named_parameters():
        if ".experts." in name:
            experts += parameter.numel()
        elif name.endswith(("norm.weight", "router.weight")):
            exact += parameter.numel()
        else:
            others += parameter.numel()
    return experts, exact, others


def _fsdp_minimum(config: Config, layout: Layout) -> dict[tuple[str, str], int]:
    """Bytes that must reach a rank in one microbatch: every parameter gathered for the forward and
    for the backward in bf16 (norms and routers once, in fp32), every gradient reduced in fp32."""
    experts, exact, others = _elements(config)
    experts //= layout.ep

    def remote(num_bytes: int, ranks: int) -> int:
        return num_bytes * (ranks - 1) // ranks

    n, e, r = layout.fsdp, layout.expert_fsdp, layout.dp_replicate
    minimum = {
        ("all-gather", "fsdp"): remote(2 * BF16 * others + FP32 * exact, n),
        ("reduce-scatter", "fsdp"): remote(FP32 * (others + exact), n),
        ("all-gather", "expert_fsdp"): remote(2 * BF16 * experts, e),
        ("reduce-scatter", "expert_fsdp"): remote(FP32 * experts, e),
    }
    if r > 1:
        shards = (others + exact) // n + experts // e
        minimum["all-reduce", "dp_replicate"] = remote(2 * FP32 * shards, r)
    return minimum


def _rows_minimum(config: Config, layout: Layout, passes: int) -> int:
    """Bytes of tokens that must reach a rank's experts, or come back from others', in bf16."""
    model, batch = config.model, config.batch
    rows = batch.microbatch_rows * batch.sequence_length * model.num_experts_per_tok
    num_layers = model.num_hidden_layers - model.num_dense_layers
    num_bytes = passes * num_layers * rows * model.hidden_size * BF16
    return num_bytes * (layout.ep - 1) // layout.ep


def _small(*overrides: str) -> Config:
    return load_config(ROOT / "configs/ledger.toml", ["train.precision=bf16", *overrides])


def test_bytes_and_calls_of_a_small_step_are_exactly_the_least() -> None:
    layout = Layout(dp_shard=4, ep=2)
    config = _small("parallel.ep=2", "batch.rows_per_step=4")
    run = dry_run(config, layout)
    num_layers, num_moe_layers = 5, 4
    minimum = _fsdp_minimum(config, layout)
    # Blocks twice, embedding and head twice, norms and routers once, the final norm once.
    gathers, reductions = 2 * num_layers + 2 * 2 + 1 + 1, num_layers + 2 + 1 + 1
    counted = run.traffic
    for key, calls in (
        (("all-gather", "fsdp"), gathers),
        (("reduce-scatter", "fsdp"), reductions),
        (("all-gather", "expert_fsdp"), 2 * num_moe_layers),
        (("reduce-scatter", "expert_fsdp"), num_moe_layers),
    ):
        assert counted[key] == Traffic(calls, minimum[key]), key
    # There and back, each in both directions; routing weights there and their gradients back.
    routed = _rows_minimum(config, layout, passes=4)
    weights = routed // (2 * config.model.hidden_size) * FP32 // BF16
    assert counted["all-to-all", "ep"] == Traffic(6 * num_moe_layers, routed + weights)


def test_muon_moves_each_matrix_to_one_rank_and_back() -> None:
    """In bf16, experts not at all. A rank works on some matrices more than others: all together."""
    layout = Layout(dp_shard=4, ep=2)
    config = _small("parallel.ep=2", "batch.rows_per_step=4")
    runs = [dry_run(config, layout, rank).traffic["all-to-all", "fsdp"] for rank in range(4)]
    matrices = [
        parameter.numel()
        for name, parameter in LanguageModel.on_meta(config.model).named_parameters()
        if parameter.ndim == 2 and not name.startswith(("embed", "lm_head"))
    ]
    assert sum(run.num_bytes for run in runs) == 2 * BF16 * sum(matrices) * 3 // 4
    shapes = 6  # 32x32, 16x32, 48x32, 8x32, and two of them transposed
    assert [run.num_calls for run in runs] == 4 * [2 * shapes]


def test_every_rank_has_its_share() -> None:
    config = _small("parallel.ep=2", "parallel.pp=2", "batch.rows_per_step=4")
    layout = Layout(pp=2, dp_shard=2, ep=2)
    held = sum(dry_run(config, layout, rank).num_parameters for rank in range(4))
    assert held == sum(_elements(config))


def test_parameters_gathered_once_per_step_travel_once() -> None:
    layout = Layout(dp_shard=4, ep=2)
    overrides = ["parallel.ep=2", "batch.rows_per_step=8"]
    often = dry_run(_small(*overrides), layout).traffic
    once = dry_run(_small(*overrides, "parallel.reshard_after_forward=false"), layout).traffic
    key = ("all-gather", "expert_fsdp")
    assert often[key].num_bytes == 4 * once[key].num_bytes  # 2 microbatches, 2 passes each
    key = ("reduce-scatter", "expert_fsdp")
    assert often[key].num_bytes == 2 * once[key].num_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "passes"), [("none", 4), ("full", 6)])
def test_trinity_large_on_2048_ranks_moves_little_more_than_the_least(
    recompute: str, passes: int
) -> None:
    """The published layout: 16 copies of 128 shards, experts over 8 ranks of a node."""
    layout = Layout(dp_replicate=16, dp_shard=128, ep=8)
    config = load_config(
        ROOT / "configs/large.toml",
        [
            "parallel.dp_replicate=16",
            "parallel.ep=8",
            f"train.recompute={recompute}",
            "batch.microbatch_rows=1",
            "batch.rows_per_step=2048",
            "batch.ramp=[]",
        ],
    )
    run = dry_run(config, layout)
    for key, least in _fsdp_minimum(config, layout).items():
        assert least <= run.traffic[key].num_bytes <= 1.05 * least, key
    rows = _rows_minimum(config, layout, passes)
    assert rows <= run.traffic["all-to-all", "ep"].num_bytes <= 1.05 * rows
    assert run.traffic["all-gather", "fsdp"].num_calls <= 1.05 * (2 * 60 + 2)
    assert run.traffic["all-gather", "expert_fsdp"].num_calls == 2 * 54
    assert run.num_parameters == pytest.approx(398_635_286_016 / 128, rel=1e-3)


def test_a_job_in_the_same_process_is_not_taken_for_the_dry_run(tmp_path: Path) -> None:
    """Ranks that inherited the dry run's meshes would all save what rank 0 has."""
    axes: dict[str, object] = {"pp": 2, "dp_shard": 2, "ep": 2}
    dry_run(_small("parallel.ep=2", "batch.microbatch_rows=1"), Layout(pp=2, dp_shard=2, ep=2))
    run_layout(tmp_path / "run", "fp32", axes)
