"""Axis arithmetic, and what is refused before anything is built."""

from __future__ import annotations

import itertools

import pytest

from tools.ledger import HYBRID, ROOT
from tools.ranks import on_ranks
from trinity.core.config import ParallelConfig
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_config
from trinity.parallel.mesh import Layout, Meshes, check_layout, expert_shard_dim, layout_for

LARGE = Layout(dp_replicate=16, dp_shard=128, ep=8)


def test_the_published_layout_of_trinity_large() -> None:
    assert LARGE.world_size == 2048
    assert LARGE.fsdp == 128
    assert LARGE.expert_fsdp == 16
    assert LARGE.dp == 2048
    assert str(LARGE) == "hsdp16x128 x ep8"
    # 256 experts: 32 on each expert-parallel rank, two on each of its shards.
    assert expert_shard_dim(256 // 8, 3072, LARGE.expert_fsdp) == 0


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(), "single"),
        (Layout(dp_shard=2, ep=2), "fsdp2 x ep2"),
        (Layout(pp=2, tp=2, dp_shard=2), "pp2 x fsdp2 x tp2"),
        (Layout(cp=2, dp_shard=2, ep=2), "fsdp2 x cp2 x ep2"),
    ],
)
def test_names(layout: Layout, name: str) -> None:
    assert str(layout) == name


def test_coordinates_number_every_rank_once_with_tensor_innermost() -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4)
    seen = [layout.coordinates(rank) for rank in range(layout.world_size)]
    places = [(at.pp, at.dp_replicate, at.dp_shard, at.cp, at.tp) for at in seen]
    assert places == list(itertools.product(range(2), repeat=5))
    assert [at.ep for at in seen[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [layout.dp_rank(rank) for rank in (0, 3, 4, 8, 15, 16)] == [0, 0, 1, 2, 3, 0]


def _places() -> tuple[object, ...]:
    meshes = Meshes(Layout(pp=2, dp_shard=2, tp=2, ep=4), "cpu")
    at = meshes.at
    return (
        (at.pp, at.tp, at.ep),
        (
            meshes.dense.get_local_rank("pp"),
            meshes.dense.get_local_rank("tp"),
            meshes.sparse.get_local_rank("ep"),
        ),
    )


def test_device_meshes_agree_with_the_arithmetic() -> None:
    for ours, theirs in on_ranks(8, _places):
        assert ours == theirs


@pytest.mark.parametrize(
    ("local_experts", "width", "shards", "dim"),
    [(32, 3072, 16, 0), (8, 64, 8, 0), (4, 64, 8, -2), (6, 20, 4, -2), (6, 9, 4, None)],
)
def test_experts_are_never_padded(
    local_experts: int, width: int, shards: int, dim: int | None
) -> None:
    assert expert_shard_dim(local_experts, width, shards) == dim


def test_the_axes_must_make_up_the_world() -> None:
    assert layout_for(ParallelConfig(tp=2), 8).dp_shard == 4
    with pytest.raises(ConfigError, match=r"= 4, but the job has 6 ranks"):
        layout_for(ParallelConfig(tp=2, dp_shard=2), 6)
    with pytest.raises(ConfigError, match="start 2 ranks"):
        layout_for(ParallelConfig(tp=2), 1)


@pytest.mark.parametrize(
    ("layout", "overrides", "message"),
    [
        (Layout(tp=4), [], "num_key_value_heads=2 is not a multiple of parallel.tp=4"),
        (Layout(cp=3), [], "sequence_length=64 is not a multiple of parallel.cp x parallel.tp=3"),
        (Layout(dp_shard=3), ["batch.rows_per_step=6"], "cannot be sharded evenly"),
        (Layout(dp_shard=4, ep=3), [], "ep=3"),
        (Layout(dp_shard=16), [], "rows_per_step=8 is not a multiple"),
        (Layout(pp=2), ["batch.microbatch_rows=8"], "at least as many microbatches"),
        (Layout(pp=8), [], "needs at least 8 layers"),
        (
            Layout(tp=2),
            [*HYBRID, "model.linear.norm_groups=1"],
            "model.linear.norm_groups=1 is not a multiple of parallel.tp=2",
        ),
        (
            Layout(tp=2),
            [*HYBRID, "model.mamba2.num_groups=1"],
            "model.mamba2.num_groups=1 is not a multiple of parallel.tp=2",
        ),
        (
            Layout(cp=64),
            [*HYBRID, "model.linear.conv_width=3"],
            "mamba2.conv_width=3 reads 2 tokens back, parallel.cp leaves parts of 1 tokens",
        ),
        (
            Layout(pp=2),
            [
                "parallel.pp_schedule=interleaved_1f1b",
                "parallel.pp_stages_per_rank=2",
                "batch.rows_per_step=5",
            ],
            "multiple of its 2 rounds",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    layout: Layout, overrides: list[str], message: str
) -> None:
    config = load_config(ROOT / "configs/ledger.toml", overrides)
    with pytest.raises(ConfigError, match=message):
        check_layout(config, layout)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pp=2", "pp_schedule=zbv", "pp_stages_per_rank=2"], "reshard_after_forward=false"),
        (["pp=2", "pp_schedule=dualpipev"], "two stages on every rank"),
        (["pp=2", "pp_schedule=interleaved_1f1b"], "pp_stages_per_rank >= 2"),
        (["pp=2", "pp_stages_per_rank=2"], "one stage per rank"),
        (["tp=0"], "greater than 0"),
    ],
)
def test_schedules_that_would_be_wrong_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/ledger.toml", [f"parallel.{item}" for item in overrides])
