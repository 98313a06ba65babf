"""The parameter table covers everything exactly once, and its state resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from trinity.core.config import OptimConfig
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel
from trinity.optim.groups import build_optimizers, parameter_table, render_table


@pytest.mark.parametrize("router", ["muon", "adamw"])
@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_once(repository: Path, router: str, muon: bool) -> None:
    config = load_config(
        repository / "configs/nano.toml",
        [f"optim.router={router}", f"optim.muon.enabled={str(muon).lower()}"],
    )
    model = LanguageModel.on_meta(config.model)
    rows = parameter_table(model.named_parameters(), config.optim)
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in model.parameters())
    for row in rows:
        is_matrix = "_proj" in row.name or "experts" in row.name
        is_router = row.name.endswith("router.weight")
        takes_muon = muon and (is_matrix or (is_router and router == "muon"))
        assert (row.optimizer == "muon") == takes_muon, row.name
        assert (row.weight_decay > 0) == (is_matrix or is_router), row.name
    optimizers = build_optimizers(model.named_parameters(), config.optim)
    held = [
        id(p)
        for optimizer in optimizers.optimizers.values()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_an_unknown_parameter_is_refused_by_name() -> None:
    extra = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"backbone\.surprise of shape"):
        parameter_table([("backbone.surprise", extra)], OptimConfig())


def test_the_printed_table_names_every_kind_of_parameter(tiny_toml: Path) -> None:
    config = load_config(tiny_toml)
    model = LanguageModel.on_meta(config.model)
    console = Console(width=140, record=True)
    console.print(render_table(parameter_table(model.named_parameters(), config.optim)))
    text = console.export_text()
    for part in ("embed_tokens.weight", "layers.*.ffn.experts.gate_up", "router.weight", "muon"):
        assert part in text


def _train(model: LanguageModel, optimizers: object, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.set_lr(0.5)  # type: ignore[attr-defined]
        optimizers.step()  # type: ignore[attr-defined]
        optimizers.zero_grad()  # type: ignore[attr-defined]


def test_state_resumes_bit_for_bit(tiny_toml: Path) -> None:
    config = load_config(tiny_toml)
    whole = LanguageModel.initialized(config.model, seed=0)
    optimizers = build_optimizers(whole.named_parameters(), config.optim)
    _train(whole, optimizers, range(3))
    weights = {name: t.clone() for name, t in whole.state_dict().items()}
    state = {name: t.clone() for name, t in optimizers.state_dict().items()}
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    _train(whole, optimizers, range(3, 6))
    resumed = LanguageModel.initialized(config.model, seed=9)
    resumed.load_state_dict(weights)
    again = build_optimizers(resumed.named_parameters(), config.optim)
    again.load_state_dict(state)
    _train(resumed, again, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_foreign_state_is_refused(tiny_toml: Path) -> None:
    config = load_config(tiny_toml)
    optimizers = build_optimizers(
        LanguageModel.initialized(config.model, seed=0).named_parameters(), config.optim
    )
    state = optimizers.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(ConfigError, match="does not fit"):
        optimizers.load_state_dict(state)
