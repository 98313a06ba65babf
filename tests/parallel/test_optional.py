"""Optional packages: FP8 linears of torchao (emulated here), the interface of DeepEP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.parallel import gloo_deep_ep
from tests.train.poison import GOES_BACK, train
from tools.ledger import LAYOUTS, ROOT, TOLERANCE, compare, run_layout
from tools.ranks import on_ranks
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel
from trinity.parallel.deep_ep import DeepEPDispatcher
from trinity.parallel.precision import leave_fp8, use_fp8

CONFIG = load_config(ROOT / "configs/ledger.toml").model


def test_fp8_takes_the_linears_of_the_blocks_and_nothing_else() -> None:
    model = LanguageModel.on_meta(CONFIG)
    names = set(dict(model.named_parameters()))
    use_fp8(model, "tensorwise")
    assert set(dict(model.named_parameters())) == names
    converted = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    linears = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("backbone.layers")
    }
    assert converted == linears
    assert len(linears) == 5 * 5 + 3 + 4 * 3  # attention, one dense feed-forward, shared experts


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_rounds_the_products_and_learns_all_the_same(recipe: str) -> None:
    tokens_BS = torch.randint(0, 512, (2, 32))
    # Without experts: rounding makes some tokens choose another, which is no matter of precision.
    dense = CONFIG.model_copy(update={"ffn_types": ("dense",) * CONFIG.num_hidden_layers})
    exact = LanguageModel.initialized(dense, seed=1)
    rounded = LanguageModel.initialized(dense, seed=1)
    use_fp8(rounded, recipe)  # type: ignore[arg-type]
    losses = [m.loss(tokens_BS, tokens_BS.roll(-1, 1)).total for m in (exact, rounded)]
    assert losses[0] != losses[1]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-2)
    for loss in losses:
        loss.backward()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (exact, rounded)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_layers_leave_fp8_by_name() -> None:
    tokens_BS = torch.randint(0, 512, (2, 32))
    exact, model = (LanguageModel.initialized(CONFIG, seed=1) for _ in range(2))
    use_fp8(model, "tensorwise")
    assert leave_fp8(model, ["layers.0.mixer.q_proj"]) == ["backbone.layers.0.mixer.q_proj"]
    left = leave_fp8(model, ["layers.0.*"])
    assert left
    assert all(name.startswith("backbone.layers.0.") for name in left)
    assert leave_fp8(model, ["layers.0.*"]) == []
    assert any(type(m).__name__ == "Float8Linear" for m in model.modules())
    leave_fp8(model, ["*"])
    losses = [m.loss(tokens_BS, tokens_BS.roll(-1, 1)).total for m in (exact, model)]
    assert torch.equal(*losses)


@pytest.mark.slow
def test_a_rewind_takes_layers_out_of_fp8_for_good(tiny_toml: Path, tmp_path: Path) -> None:
    """FSDP holds the modules: they change in place, and again when the run is opened anew."""
    fp8 = ["train.fp8=tensorwise", "batch.microbatch_rows=1", "data.lanes=4"]
    overrides = [*fp8, *GOES_BACK, 'rewind.fp8_fallback=["layers.0.*"]']
    for resume in (False, True):
        told = on_ranks(2, _linears_after, tiny_toml, tmp_path / "run", overrides, resume)
        for names in told:
            assert not any("layers.0." in name for name in names), resume
            assert any("layers.1." in name for name in names), resume


def _linears_after(toml: Path, directory: Path, overrides: list[str], resume: bool) -> list[str]:
    more = ["train.num_steps=30"] if resume else []
    run = train(toml, directory, [*overrides, *more], range(80, 96), resume=resume)
    (stage,) = run.model.stages
    return [name for name, m in stage.named_modules() if type(m).__name__ == "Float8Linear"]


def test_fp8_under_tensor_and_expert_parallel(tmp_path: Path) -> None:
    overrides = ["train.fp8=tensorwise", "optim.muon.dtype=bf16"]
    single = run_layout(tmp_path / "single", "bf16", {}, overrides)
    for name in ("tp2 x ep2", "fsdp2 x ep2"):
        outcome = run_layout(tmp_path / name.replace(" ", ""), "bf16", LAYOUTS[name], overrides)
        assert outcome.losses == pytest.approx(single.losses, rel=1e-2)


def test_fp8_without_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"trinity-pretrain\[fp8\]"):
        use_fp8(LanguageModel.on_meta(CONFIG), "tensorwise")


def test_deep_ep_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.dispatcher"):
        DeepEPDispatcher(None, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ep2", "tp2 x ep2"])
def test_the_deep_ep_dispatcher_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In fp32, because DeepEP's routing weights are."""
    monkeypatch.setitem(sys.modules, "deep_ep", gloo_deep_ep)
    single = run_layout(tmp_path / "single", "fp32", {})
    axes = {**LAYOUTS[name], "dispatcher": "deep_ep"}
    outcome = run_layout(tmp_path / "layout", "fp32", axes)
    differences = compare(outcome, single)
    assert max(differences.values()) <= TOLERANCE["fp32"], differences
