"""Every layout against one process: see tools/ledger.py, which prints the same as a table."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tools import ledger
from tools.ledger import DIT, LAYOUTS, TOLERANCE, VARIANTS, Outcome, compare, run_layout
from tools.ranks import on_ranks
from trinity.ckpt.store import stored_names
from trinity.nn.feedforward import GroupedExperts
from trinity.parallel import plan
from trinity.train.run import create_run_directory

Singles = dict[tuple[str, ...], Outcome]
DEAR_VARIANTS = (
    "hybrid, cp4",
    "hybrid, tp2 x ep2, full recompute",
    "hybrid, cp2 x ep2, selective recompute",
)
"""Half a minute each, of parts that other rows have apart: left to `-m slow` and to the tool."""
SOME_DIT = ("DiT, tp2 x pp2 x fsdp2", "DiT, tp2", "DiT, ep2 x cp2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def singles() -> Singles:
    """One-process runs by precision and overrides, each made once."""
    return {}


def _single(
    root: Path, singles: Singles, dtype: str, overrides: list[str], *, dit: bool = False
) -> Outcome:
    key = ("dit" if dit else "lm", dtype, *overrides)
    if key not in singles:
        directory = root / f"single{len(singles)}"
        singles[key] = run_layout(directory, dtype, {}, overrides, dit=dit)
    return singles[key]


def _assert_green(differences: dict[str, float], dtype: str) -> None:
    assert max(differences.values()) <= TOLERANCE[dtype], differences


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(root: Path, singles: Singles, name: str) -> None:
    outcome = run_layout(root / name.replace(" ", ""), "fp64", LAYOUTS[name])
    _assert_green(compare(outcome, _single(root, singles, "fp64", [])), "fp64")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in DEAR_VARIANTS else name
        for name in VARIANTS
    ],
)
def test_variant_equals_one_process(root: Path, singles: Singles, name: str) -> None:
    axes, overrides = VARIANTS[name]
    outcome = run_layout(root / name.replace(" ", ""), "fp64", axes, overrides)
    _assert_green(compare(outcome, _single(root, singles, "fp64", overrides)), "fp64")


# The suite has a row for every axis: these take longer than those of text.
@pytest.mark.parametrize(
    "name",
    [name if name in SOME_DIT else pytest.param(name, marks=pytest.mark.slow) for name in DIT],
)
def test_diffusion_transformer_equals_one_process(root: Path, singles: Singles, name: str) -> None:
    """Its averaged weights count as parameters."""
    # First, so that the ranks need not import again what reading digits takes.
    fewer = ["batch.rows_per_step=4"]
    single = _single(root, singles, "fp64", fewer, dit=True)
    outcome = run_layout(root / name.replace(" ", ""), "fp64", DIT[name], fewer, dit=True)
    names = stored_names(outcome.directory / "checkpoints/step-00000002")
    assert sum(name.startswith("ema.") for name in names) > 100
    _assert_green(compare(outcome, single), "fp64")


@pytest.mark.parametrize("name", ["fsdp2 x ep2", "tp2 x pp2 x fsdp2"])
def test_layout_in_fp32(root: Path, singles: Singles, name: str) -> None:
    outcome = run_layout(root / f"fp32-{name.replace(' ', '')}", "fp32", LAYOUTS[name])
    _assert_green(compare(outcome, _single(root, singles, "fp32", [])), "fp32")


@pytest.mark.parametrize("name", ["fsdp2 x ep2", "tp2 x ep2", "pp2 x fsdp2"])
def test_layout_in_bf16(root: Path, singles: Singles, name: str) -> None:
    """As near to fp32 as one process is: sharding rounds other intermediate results."""
    overrides = ["optim.muon.dtype=bf16"]
    outcome = run_layout(root / f"bf16-{name.replace(' ', '')}", "bf16", LAYOUTS[name], overrides)
    exact = _single(root, singles, "fp32", [])
    assert outcome.losses == pytest.approx(exact.losses, rel=2e-3)
    assert outcome.grad_norms[0] == pytest.approx(exact.grad_norms[0], rel=1e-2)
    assert outcome.grad_norms == pytest.approx(exact.grad_norms, rel=5e-2)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(root: Path, singles: Singles) -> None:
    outcome = run_layout(root / "compiled", "fp32", LAYOUTS["fsdp2 x ep2"], ["train.compile=true"])
    _assert_green(compare(outcome, _single(root, singles, "fp32", [])), "fp32")


def test_the_ledger_sees_a_wrong_gradient_scale_of_experts(
    root: Path, singles: Singles, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = plan.shard_parameters

    def averaged(*arguments: object) -> None:
        """What FSDP2 does if left alone: the mean over the ranks of an expert."""
        right(*arguments)  # type: ignore[arg-type]
        stage = arguments[0]
        assert isinstance(stage, torch.nn.Module)
        for module in stage.modules():
            if isinstance(module, GroupedExperts) and isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0)

    monkeypatch.setattr(plan, "shard_parameters", averaged)
    outcome = run_layout(root / "wrong", "fp64", LAYOUTS["fsdp2 x ep2"])
    differences = compare(outcome, _single(root, singles, "fp64", []))
    red = {column for column, value in differences.items() if value > TOLERANCE["fp64"]}
    assert {"gradient norm", "parameters", "optimizer state", "resumed"} <= red


def test_checkpoints_move_between_layouts(root: Path, singles: Singles) -> None:
    """Saved at fsdp2 x ep2, resumed alone, at tp2, at pp2 x fsdp2, and back: one curve."""
    directory = root / "travelling"
    chain = ["fsdp2 x ep2", "single", "tp2+sp", "pp2 x fsdp2", "fsdp2 x ep2"]
    losses, norms = [], []
    for number, name in enumerate(chain):
        axes = LAYOUTS.get(name, {})
        config = ledger.ledger_config(root, "fp64", ledger.axes_as_overrides(axes))
        if number == 0:
            create_run_directory(directory, config)
        leg = partial(ledger.train, config, directory, 1, resume=number > 0)
        world_size = ledger.world_size_of(axes)
        result = leg() if world_size == 1 else on_ranks(world_size, leg)[0]
        losses += result[0]
        norms += result[1]
    single = _single(root, singles, "fp64", [])
    assert losses[:4] == pytest.approx(single.losses, rel=1e-12)
    assert norms[:4] == pytest.approx(single.grad_norms, rel=1e-10)
    assert losses[4] < losses[0]
