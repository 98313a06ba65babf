"""One optimizer step: accumulation, recomputation and precision change nothing they should not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trinity.core.batch import Batch
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel
from trinity.optim.groups import build_optimizers
from trinity.parallel.model import ParallelModel
from trinity.parallel.recompute import apply_recompute
from trinity.train.step import StepResult, train_step

NUM_ROWS = 4


def _batch(config: Config, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_ROWS, config.batch.sequence_length)
    tokens_BS = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    targets_BS = torch.roll(tokens_BS, -1, dims=1)
    documents_BS = torch.zeros(shape, dtype=torch.int32)
    for row, cut in enumerate((0, 7, 31, 63)):  # a different number of valid tokens in each row
        documents_BS[row, cut:] += 1
        targets_BS[row, :cut] = -100
    return Batch(tokens_BS, targets_BS, documents_BS)


def _train(
    config: Config, microbatch_rows: int, *, num_steps: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, torch.Tensor], list[StepResult]]:
    model = LanguageModel.initialized(config.model, seed=1).to(dtype)
    for moe in model.moe_layers():  # balancing state stays fp32 in any precision
        moe.router.float()
        moe.router.weight.data = moe.router.weight.data.to(dtype)
    apply_recompute(model.backbone.layers.values(), config.train.recompute)
    optimizers = build_optimizers(model.named_parameters(), config.optim)
    results = []
    for step in range(num_steps):
        batch = _batch(config, step)
        split = [
            Batch(*(field[i : i + microbatch_rows] for field in batch))
            for i in range(0, NUM_ROWS, microbatch_rows)
        ]
        pending = train_step(ParallelModel.whole(model, config), optimizers, split, config)
        results.append(pending.result())
    return dict(model.state_dict()), results


@pytest.fixture
def config(tiny_toml: Path) -> Config:
    return load_config(
        tiny_toml, ["balance.sequence_loss=0.01", "loss.z_loss=1e-3", "optim.muon.dtype=fp32"]
    )


@pytest.mark.parametrize("rule", ["smebu", "sign", "none"])
def test_accumulation_1_2_4_gives_equal_parameters(config: Config, rule: str) -> None:
    balance = config.balance.model_copy(update={"rule": rule})
    config = config.model_copy(update={"balance": balance})
    whole, whole_results = _train(config, 4)
    for rows in (2, 1):
        parts, parts_results = _train(config, rows)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-7, msg=name)
        for one, other in zip(whole_results, parts_results, strict=True):
            assert torch.equal(one.load_LE, other.load_LE)
            assert one.loss == pytest.approx(other.loss, rel=1e-9)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-9)
            assert one.balance_loss == pytest.approx(other.balance_loss, rel=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recompute_changes_neither_parameters_nor_counts(config: Config, mode: str) -> None:
    plain, plain_results = _train(config, 2)
    train = config.train.model_copy(update={"recompute": mode})
    again, again_results = _train(config.model_copy(update={"train": train}), 2)
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-9, msg=name)
    routed = NUM_ROWS * config.batch.sequence_length * config.model.num_experts_per_tok
    for one, other in zip(plain_results, again_results, strict=True):
        assert torch.equal(one.load_LE, other.load_LE)
        assert (one.load_LE.sum(1) == routed).all()


def test_bias_moves_once_per_step_and_keeps_its_sum(config: Config) -> None:
    state, _ = _train(config, 1, num_steps=1)
    biases = [t for name, t in state.items() if name.endswith("expert_bias")]
    assert biases
    for bias_E in biases:
        assert bias_E.dtype == torch.float32
        assert bias_E.abs().sum() > 0
        assert abs(float(bias_E.sum())) < 1e-6
        assert float(bias_E.abs().max()) <= 2 * config.balance.step  # one move, not several


def test_a_step_whose_loss_is_not_finite_moves_nothing(config: Config) -> None:
    model = LanguageModel.initialized(config.model, seed=1)
    optimizers = build_optimizers(model.named_parameters(), config.optim)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    whole = ParallelModel.whole(model, config)
    result = train_step(whole, optimizers, [_batch(config, 0)], config).result()
    assert math.isnan(result.loss)
    assert not result.accepted
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def test_batch_het_is_the_spread_of_microbatch_losses(config: Config) -> None:
    _, one = _train(config, 4, num_steps=1)
    assert one[0].batch_het == 0.0
    _, many = _train(config, 1, num_steps=1)
    assert many[0].batch_het > 0.0
