"""The search: what it considers, why it refuses, what it prints."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.ledger import ROOT
from trinity.cli import app
from trinity.core.config import Config
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_config
from trinity.parallel.mesh import Layout, check_layout
from trinity.plan.command import parallel_toml, parse_layout
from trinity.plan.explain import explain
from trinity.plan.hardware import load_efficiency, load_gpu
from trinity.plan.memory import usable_bytes
from trinity.plan.search import (
    Candidate,
    Rejection,
    Setting,
    divisors,
    evaluate,
    layouts,
    search,
    settings,
)
from trinity.plan.shapes import model_shape

RESIDENT = Setting(1, False, "1f1b", 1, 4096)
RESHARDED = Setting(1, True, "1f1b", 1, 4096)


def _large(*overrides: str) -> Config:
    return load_config(ROOT / "configs/large.toml", ["batch.ramp=[]", *overrides])


def _evaluate(
    config: Config, layout: Layout, setting: Setting, gpu: str = "h200"
) -> Candidate | Rejection:
    shape = model_shape(config.model, config.optim)
    return evaluate(config, layout, setting, load_gpu(gpu), shape)


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(16) == [1, 2, 4, 8, 16]


def test_every_layout_uses_all_gpus_once() -> None:
    found = list(layouts(_large(), 64, load_gpu("h200")))
    assert len(found) == len(set(found))
    assert {layout.world_size for layout in found} == {64}
    assert all(layout.copy_size % layout.ep == 0 for layout in found)
    assert max(layout.tp for layout in found) == 8
    assert Layout(pp=8, dp_shard=8, ep=8) in found


def test_pipelines_never_reshard_and_microbatches_divide_the_rows() -> None:
    config = _large()
    flat = list(settings(config, Layout(dp_shard=2048, ep=8)))
    assert {setting.reshard_after_forward for setting in flat} == {True, False}
    assert {setting.microbatch_rows for setting in flat} == {1, 2, 3, 6}
    piped = list(settings(config, Layout(pp=8, dp_shard=256, ep=8)))
    assert not any(setting.reshard_after_forward for setting in piped)
    assert {setting.pp_stages_per_rank for setting in piped} == {1, 2, 3, 4}


def test_refusals_name_the_reason() -> None:
    config = _large()
    odd = _evaluate(config, Layout(dp_shard=7), RESIDENT)
    assert isinstance(odd, Rejection)
    assert odd.kind == "does not divide"
    assert "256 experts of width 3072" in odd.reason
    few = _evaluate(config, Layout(pp=16, dp_replicate=1024), RESIDENT)
    assert isinstance(few, Rejection)
    assert few.kind == "too few microbatches"
    full = _evaluate(config, Layout(dp_shard=8, ep=8), RESHARDED)
    assert isinstance(full, Rejection)
    assert full.kind == "does not fit"
    # 398 billion parameters, gradients and momenta on eight ranks.
    assert full.missing_bytes > 12 * 398e9 / 8 - 150e9
    assert f"{full.missing_bytes / 1e9:.1f} too many" in full.reason


def test_the_lightest_recompute_that_fits_is_chosen() -> None:
    config, layout = _large(), Layout(pp=8, dp_shard=256, ep=8)
    roomy = _evaluate(config, layout, RESIDENT, "b300")
    tight = _evaluate(config, layout, RESIDENT, "h200")
    assert isinstance(roomy, Candidate)
    assert isinstance(tight, Candidate)
    assert roomy.case.config.train.recompute == "none"
    assert tight.case.config.train.recompute != "none"
    usable = usable_bytes(load_gpu("h200"), load_efficiency())
    assert tight.memory.total <= usable < roomy.memory.total


def test_search_ranks_what_fits_and_the_winner_would_train() -> None:
    config = load_config(ROOT / "configs/nano.toml", ["batch.ramp=[]"])
    plan = search(config, 8, load_gpu("h200"))
    times = [candidate.cost.step_s for candidate in plan.ranking]
    assert times == sorted(times)
    winner = plan.ranking[0]
    assert winner.case.layout.world_size == 8
    check_layout(winner.case.config, winner.case.layout)
    paragraph = explain(winner, plan.ranking[-1])
    assert f"{winner.cost.tokens_per_s:,.0f} tokens/s/GPU" in paragraph
    # What is to be pasted is a valid configuration and means the same.
    pasted = tomllib.loads(parallel_toml(winner))
    flat = [
        f"{table}.{key}={json.dumps(value)}"
        for table, values in pasted.items()
        for key, value in values.items()
    ]
    again = load_config(ROOT / "configs/nano.toml", ["batch.ramp=[]", *flat])
    assert again.parallel == winner.case.config.parallel
    assert again.batch == winner.case.config.batch


def test_nothing_fits_is_an_error_with_the_nearest_miss() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 2 h200 works.*too many"):
        search(_large("batch.rows_per_step=16"), 2, load_gpu("h200"))


def test_layouts_given_as_text() -> None:
    assert parse_layout("dp_replicate=16,dp_shard=128,ep=8", 2048) == Layout(1, 16, 128, 1, 1, 8)
    assert parse_layout("pp=4, ep=8", 64) == Layout(pp=4, dp_shard=16, ep=8)
    with pytest.raises(ConfigError, match="dp="):
        parse_layout("dp=4", 4)
    with pytest.raises(ConfigError, match="64 ranks, not of --gpus 32"):
        parse_layout("dp_shard=64", 32)


def test_command_prints_tables_a_paragraph_and_toml(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    config = str(ROOT / "configs/single_gpu.toml")
    result = CliRunner().invoke(
        app, ["plan", config, "--gpus", "4", "--gpu", "h200", "--top", "3", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    for text in ("fastest layouts", "microseconds per token", "plans that cannot", "[parallel]"):
        assert text in result.output
    answer = json.loads(path.read_text())
    assert len(answer["ranking"]) <= 3
    first = answer["ranking"][0]
    assert first["memory_bytes"]["total"] > 0
    assert sum(first["seconds_by_part"].values()) == pytest.approx(first["step_s"])


def test_a_configured_layout_that_cannot_be_is_told_and_others_are_found() -> None:
    config = str(ROOT / "configs/tiny.toml")  # 8 rows a step, 8 in a microbatch
    result = CliRunner().invoke(app, ["plan", config, "--gpus", "2"])
    assert result.exit_code == 0, result.output
    assert "is refused: batch.rows_per_step=8" in result.output


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--gpu b9000 is unknown; use one of .*h200"):
        load_gpu("b9000")
