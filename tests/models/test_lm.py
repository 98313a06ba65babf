"""The language model: sizes, initialisation, documents that do not leak, exact routing counts."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trinity.core.config import ModelConfig
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel, parameter_counts
from trinity.parallel.recompute import apply_recompute

# Totals confirmed on the released models; active ones leave out the input embedding.
RELEASED = {
    "nano": (6_120_003_328, 0.819e9),
    "mini": (26_123_974_400, 3.065e9),
    "large": (398_635_286_016, 12.757e9),
}


def _config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "route_scale": 2.0,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
    }
    return ModelConfig.model_validate(values | changes)


def _model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = LanguageModel.initialized(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_exact_size(repository: Path, name: str) -> None:
    counts = parameter_counts(load_config(repository / f"configs/{name}.toml").model)
    total, active = RELEASED[name]
    assert counts["total"] == total
    assert counts["active"] == pytest.approx(active, rel=1e-3)


def test_meta_construction_allocates_nothing(repository: Path) -> None:
    model = LanguageModel.on_meta(load_config(repository / "configs/large.toml").model)
    assert all(t.is_meta for t in model.state_dict().values())


DOCUMENTS = (0, 13, 14, 37, 50)  # starts: one of a single token, cuts inside attention blocks


def _document_ids(length: int) -> torch.Tensor:
    ids_S = torch.zeros(length, dtype=torch.int32)
    for start in DOCUMENTS[1:]:
        ids_S[start:] += 1
    return ids_S[None]


@pytest.mark.parametrize("window", [3, 8, 64])
def test_packed_documents_do_not_leak(window: int) -> None:
    """Perturbing one document moves no bit of any other document's logits."""
    model = _model(_config(sliding_window=window))
    tokens_BS = torch.randint(0, 97, (1, 63))
    ids_BS = _document_ids(63)
    before = model(tokens_BS, ids_BS)
    for document in range(len(DOCUMENTS)):
        inside_BS = ids_BS == document
        changed_BS = torch.where(inside_BS, (tokens_BS + 1) % 97, tokens_BS)
        after = model(changed_BS, ids_BS)
        # Experts see other row counts, so products of other documents may round differently.
        torch.testing.assert_close(after[~inside_BS], before[~inside_BS], rtol=0, atol=1e-12)
        assert (after[inside_BS] - before[inside_BS]).abs().max() > 1e-3
    # Without the mask the documents do see each other: the test can fail.
    leaking = model(torch.where(ids_BS == 0, (tokens_BS + 1) % 97, tokens_BS)) - model(tokens_BS)
    assert leaking[ids_BS == 4].abs().max() > 1e-6


def test_packed_documents_equal_documents_run_apart() -> None:
    """Positions need no reset: rotary positions are relative and global layers have none."""
    model = _model(_config())
    tokens_BS = torch.randint(0, 97, (1, 63))
    packed = model(tokens_BS, _document_ids(63))
    for start, end in zip(DOCUMENTS, (*DOCUMENTS[1:], 63), strict=True):
        # Rotary tables are fp32, so relative angles agree to fp32 rounding only.
        torch.testing.assert_close(
            model(tokens_BS[:, start:end]), packed[:, start:end], rtol=0, atol=2e-6
        )


def test_a_local_layer_sees_exactly_its_window() -> None:
    config = _config(num_hidden_layers=1, num_dense_layers=1, layer_types=["sliding_attention"])
    model = _model(config)
    tokens_BS = torch.randint(0, 97, (1, 30))
    before = model(tokens_BS)[0, 20]
    for position in range(30):
        changed_BS = tokens_BS.clone()
        changed_BS[0, position] = (changed_BS[0, position] + 1) % 97
        moved = bool((model(changed_BS)[0, 20] - before).abs().max() > 1e-9)
        assert moved == (20 - 8 < position <= 20), position


def test_global_layers_carry_no_position() -> None:
    """Shuffling what came before a token does not change what it sees."""
    config = _config(num_hidden_layers=1, num_dense_layers=1, layer_types=["full_attention"])
    model = _model(config)
    tokens_BS = torch.randint(0, 97, (1, 30))
    shuffled_BS = tokens_BS.clone()
    shuffled_BS[0, :29] = tokens_BS[0, torch.randperm(29)]
    torch.testing.assert_close(model(shuffled_BS)[0, 29], model(tokens_BS)[0, 29])


def test_initialisation_follows_the_table() -> None:
    config = _config(hidden_size=64, vocab_size=1000, num_experts=16)
    model = LanguageModel.initialized(config, seed=3)
    std = 0.5 / math.sqrt(64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            gain = 1 / math.sqrt(4) if "post_norm" in name else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, gain)), name
        else:
            assert float(parameter.abs().max()) <= 3 * std, name
            if parameter.numel() > 5000:
                # Cutting at 3 sigma lowers the standard deviation by 1.3 %.
                assert float(parameter.std()) == pytest.approx(0.9866 * std, rel=0.04), name
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert not buffer.any(), name
    # The stream starts at a standard deviation of 0.5.
    stream = model.embed_tokens.weight * 64**0.5
    assert float(stream.std()) == pytest.approx(0.5, rel=0.05)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    small = LanguageModel.initialized(_config(), seed=1).state_dict()
    torch.randn(17)  # the global generator plays no part
    deeper = LanguageModel.initialized(_config(num_hidden_layers=6), seed=1).state_dict()
    other = LanguageModel.initialized(_config(), seed=2).state_dict()
    for name, tensor in small.items():
        if tensor.ndim > 1:
            assert torch.equal(tensor, deeper[name]), name
            assert not torch.equal(tensor, other[name]), name


def _reentrant(model: LanguageModel) -> None:
    for block in model.backbone.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)


@pytest.mark.parametrize("mode", ["none", "full", "selective", "reentrant"])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_counts_and_gradients_are_exact_under_every_recompute_mode(
    mode: str, precision: str
) -> None:
    config = _config()
    dtype = torch.float64 if precision == "fp64" else torch.float32
    tokens_BS = torch.randint(0, 97, (2, 21))
    outcomes = []
    for chosen in ("none", mode):
        torch.manual_seed(5)
        model = _model(config, dtype)
        if chosen == "reentrant":
            _reentrant(model)
        else:
            apply_recompute(model.backbone.layers, chosen)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(tokens_BS, tokens_BS.roll(-1, 1), _document_ids(21).expand(2, -1))
        (loss.total + loss.balance_loss).backward()
        # Every routed token counted once, also after the backward has run the forward again.
        assert loss.load_LE.shape == (3, 6)
        assert (loss.load_LE.sum(1) == 2 * 21 * 2).all()
        outcomes.append((loss.load_LE, [p.grad for p in model.parameters()]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for one, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = _model(_config())
    tokens_BS = torch.randint(0, 97, (2, 33))
    targets_BS = tokens_BS.roll(-1, 1)
    targets_BS[:, 5:9] = -100
    loss = model.loss(tokens_BS, targets_BS, z_loss=0.1, chunk_rows=7)
    logits_TV = model(tokens_BS).flatten(0, 1)[targets_BS.flatten() != -100]
    valid_T = targets_BS[targets_BS != -100]
    lse_T = torch.logsumexp(logits_TV, -1)
    cross_entropy = (lse_T - logits_TV.gather(1, valid_T[:, None])[:, 0]).sum()
    torch.testing.assert_close(loss.cross_entropy.double(), cross_entropy.detach())
    torch.testing.assert_close(loss.z.double(), lse_T.square().sum().detach())
    expected = cross_entropy + 0.1 * lse_T.square().sum()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-6, atol=1e-6)
