"""The language model: sizes, initialisation, documents that do not leak, loss, recompute."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import trinity.models.backbone
from trinity.core.config import ModelConfig
from trinity.core.load_config import load_config
from trinity.models.lm import LanguageModel, parameter_counts
from trinity.models.staged import LossSums
from trinity.nn.moe import MoE
from trinity.parallel.recompute import apply_recompute

aten = torch.ops.aten

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


# Starts of documents in two rows: single tokens, cuts inside attention blocks, none shared.
DOCUMENTS = ((0, 13, 14, 37, 50), (0, 1, 9, 29, 62))
LENGTH = 63


def _document_ids(length: int = LENGTH) -> Tensor:
    ids_BS = torch.zeros(len(DOCUMENTS), length, dtype=torch.int32)
    for row, starts in enumerate(DOCUMENTS):
        for start in starts[1:]:
            ids_BS[row, start:] += 1
    return ids_BS


@pytest.mark.parametrize("window", [3, 8, 64])
def test_packed_documents_do_not_leak(window: int) -> None:
    """Perturbing one document moves no other document's logits, in its row or the other."""
    model = _model(_config(sliding_window=window))
    tokens_BS = torch.randint(0, 97, (2, LENGTH))
    ids_BS = _document_ids()
    before = model(tokens_BS, ids_BS)
    for row, starts in enumerate(DOCUMENTS):
        for document in range(len(starts)):
            inside_BS = ids_BS == document
            inside_BS[1 - row] = False
            changed_BS = torch.where(inside_BS, (tokens_BS + 1) % 97, tokens_BS)
            after = model(changed_BS, ids_BS)
            # Experts see other row counts, so products of other documents may round differently.
            torch.testing.assert_close(after[~inside_BS], before[~inside_BS], rtol=0, atol=1e-12)
            assert (after[inside_BS] - before[inside_BS]).abs().max() > 1e-3
    # Without the mask the documents do see each other: the test can fail.
    leaking = model(torch.where(ids_BS == 0, (tokens_BS + 1) % 97, tokens_BS)) - model(tokens_BS)
    assert leaking[ids_BS == 4].abs().max() > 1e-6


def _exact_rope_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Rotary tables in fp64, so that equal distances give equal scores to the last digits."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    positions = torch.arange(start, start + num_positions, dtype=torch.float64)
    angles = torch.outer(positions, frequencies).repeat(1, 2).to(device)
    return angles.cos(), angles.sin()


# The model's own tables are fp32 like every published checkpoint's: good to fp32 rounding only.
@pytest.mark.parametrize(("exact_tables", "atol"), [(True, 1e-10), (False, 2e-6)])
def test_packed_documents_equal_documents_run_apart(
    exact_tables: bool, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions need no reset: rotary positions are relative and global layers have none."""
    if exact_tables:
        monkeypatch.setattr(trinity.models.backbone, "rope_tables", _exact_rope_tables)
    model = _model(_config())
    tokens_BS = torch.randint(0, 97, (2, LENGTH))
    packed = model(tokens_BS, _document_ids())
    for row, starts in enumerate(DOCUMENTS):
        for start, end in zip(starts, (*starts[1:], LENGTH), strict=True):
            apart = model(tokens_BS[row : row + 1, start:end])
            torch.testing.assert_close(apart[0], packed[row, start:end], rtol=0, atol=atol)


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
            assert float(parameter.detach().abs().max()) <= 3 * std, name
            if parameter.numel() > 5000:
                # Cutting at 3 sigma lowers the standard deviation by 1.3 %.
                assert float(parameter.detach().std()) == pytest.approx(0.9866 * std, rel=0.04), (
                    name
                )
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert not buffer.any(), name
    # The stream starts at a standard deviation of 0.5.
    stream = model.embed_tokens.weight.detach() * 64**0.5
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
    z = lse_T.square().sum()
    torch.testing.assert_close(loss.error, cross_entropy.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.z, z.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, cross_entropy + 0.1 * z, rtol=1e-12, atol=0)


class _OpCounts(TorchDispatchMode):
    """Counts every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def _recomputing(mode: str, dtype: torch.dtype, *, gpu_ops: bool = False) -> LanguageModel:
    """``gpu_ops``: the attention and expert backends that a GPU would choose."""
    model = LanguageModel.initialized(_config(), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for block in model.backbone.layers.values():
        if gpu_ops and isinstance(block.ffn, MoE):
            block.ffn.experts.backend = "grouped_mm"
        if gpu_ops and block.mixer.window is None:
            block.mixer.backend = "sdpa"
        if mode == "reentrant":
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    if mode != "reentrant":
        apply_recompute(model.backbone.layers.values(), mode)  # type: ignore[arg-type]
    return model.to(dtype)


def _loss(model: LanguageModel, shift: int = 1, *, autocast: bool = False) -> LossSums:
    tokens_BS = (torch.arange(42).view(2, 21) * 13 + shift * 7) % 97
    ids_BS = torch.zeros(2, 21, dtype=torch.int32)
    ids_BS[0, 9:], ids_BS[1, 3:] = 1, 1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return model.loss(tokens_BS, tokens_BS.roll(-1, 1), ids_BS)


def _gradients(model: LanguageModel) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("gpu_ops", [False, True])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "selective", "reentrant"])
def test_counts_and_gradients_are_those_without_recompute(
    mode: str, precision: str, gpu_ops: bool
) -> None:
    if gpu_ops and precision == "fp64":
        precision = "fp32"  # the grouped product has no fp64
    dtype = torch.float64 if precision == "fp64" else torch.float32
    outcomes = []
    for chosen in ("none", mode):
        model = _recomputing(chosen, dtype, gpu_ops=gpu_ops)
        loads = []
        for microbatch in range(2):
            loss = _loss(model, microbatch, autocast=precision == "bf16")
            (loss.total + loss.balance_loss).backward()
            # Every routed token once, also after the backward has run the forward again.
            assert (loss.load_LE.sum(1) == 2 * 21 * 2).all()
            loads.append(loss.load_LE)
        outcomes.append((torch.stack(loads), _gradients(model)))
    (load, expected), (other_load, gradients) = outcomes
    assert torch.equal(load, other_load)
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("gpu_ops", [False, True])
def test_what_is_kept_and_what_is_run_again(gpu_ops: bool) -> None:
    """Counted in operators of the backward: 'full' repeats all, 'selective' spares products."""
    counts = {}
    for mode in ("none", "full", "selective"):
        model = _recomputing(mode, torch.float32, gpu_ops=gpu_ops)
        loss = _loss(model)
        with _OpCounts() as backward:
            (loss.total + loss.balance_loss).backward()
        counts[mode] = backward.count
    spared = [aten.mm.default, aten.bmm.default]
    if gpu_ops:
        spared += [
            aten._grouped_mm.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        ]
    for op in spared:
        assert counts["none"][op] == counts["selective"][op] < counts["full"][op], op
    for op in (aten.topk.default, aten.silu.default):
        assert counts["none"][op] < counts["selective"][op] == counts["full"][op], op


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_two_forwards_may_share_an_autocast_region(mode: str) -> None:
    """There the second forward finds weights already cast; its replay does not."""
    outcomes = []
    for chosen in ("none", mode):
        model = _recomputing(chosen, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [_loss(model, shift, autocast=True) for shift in range(2)]
            assert torch.is_autocast_cache_enabled()
        sum(loss.total + loss.balance_loss for loss in losses).backward()  # type: ignore[union-attr]
        outcomes.append(_gradients(model))
    for name, expected in outcomes[0].items():
        # Apart or together, the two gradients of a cast weight are rounded to bf16 differently.
        error = (outcomes[1][name] - expected).abs().max() / expected.abs().max()
        assert error < 2e-2, name


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_blocks_compiled_before_are_still_compiled(mode: str) -> None:
    expected = _recomputing("none", torch.float32)
    _loss(expected).total.backward()
    model = _recomputing("none", torch.float32)
    graphs: list[Any] = []

    def compiler(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.backbone.layers.values():
        block.forward = torch.compile(block.forward, backend=compiler)
    apply_recompute(model.backbone.layers.values(), mode)  # type: ignore[arg-type]
    _loss(model).total.backward()
    assert graphs
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(
            gradient, _gradients(expected)[name], rtol=1e-4, atol=1e-5, msg=name
        )


def test_recompute_leaves_names_alone() -> None:
    plain, wrapped = _recomputing("none", torch.float32), _recomputing("selective", torch.float32)
    wrapped.load_state_dict(plain.state_dict())
    assert list(wrapped.state_dict()) == list(plain.state_dict())
