"""The model equals transformers' AfmoeForCausalLM: logits, every gradient, generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import hf_state_dict
from trinity.ckpt.hf_names import pieces
from trinity.core.config import ModelConfig
from trinity.models.generate import generate
from trinity.models.lm import LanguageModel

TOLERANCE = 1e-5
IRREGULAR = ("sliding_attention", "full_attention", "full_attention", "sliding_attention")


def _config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / heads
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "route_scale": 2.448,
        "sliding_window": 7,
        "layer_types": IRREGULAR,
        "max_position_embeddings": 256,
    }
    return ModelConfig.model_validate(values | changes)


def _peer(config: ModelConfig, experts: str) -> AfmoeForCausalLM:
    names = set(AfmoeConfig().to_dict()) & set(ModelConfig.model_fields)
    values = {name: getattr(config, name) for name in names}
    values["layer_types"] = list(config.layer_types)
    peer = AfmoeForCausalLM(AfmoeConfig(**values, eos_token_id=None, bos_token_id=None))
    peer.set_experts_implementation(experts)
    return peer.eval()


def _pair(config: ModelConfig, experts: str) -> tuple[LanguageModel, AfmoeForCausalLM]:
    """Both models with the same random weights: norms, routers and expert bias included."""
    generator = torch.Generator().manual_seed(3)
    model = LanguageModel.initialized(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.08))
        for moe in model.moe_layers():
            moe.router.expert_bias.normal_(0, 0.2, generator=generator)
    peer = _peer(config, experts)
    missing = peer.load_state_dict(
        {name: tensor.clone() for name, tensor in hf_state_dict(model).items()}
    )
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return model, peer


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


class _Ops(TorchDispatchMode):
    """Remembers which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


VARIANTS = [
    {},
    {"num_shared_experts": 1, "num_dense_layers": 0},
    {"mup_enabled": False, "num_key_value_heads": 6},
    # One expert per token would have a router gradient of exactly zero: its weight is constant.
    {"sliding_window": 64, "num_experts_per_tok": 2},
]


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_and_every_gradient(changes: dict[str, object], experts: str) -> None:
    config = _config(**changes)
    model, peer = _pair(config, experts)
    tokens_BS = torch.randint(0, config.vocab_size, (2, 33))
    with _Ops() as ops:
        theirs = peer(input_ids=tokens_BS, labels=tokens_BS)
    # The peer really took the path this case is about.
    assert (torch.ops.aten._grouped_mm.default in ops.seen) == (experts == "grouped_mm")
    logits_BSV = model(tokens_BS)
    assert _relative(logits_BSV, theirs.logits) < TOLERANCE
    theirs.loss.backward()
    # Once through the logits, once through the chunked loss that training uses.
    targets_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    chunked = model.loss(tokens_BS, targets_BS, chunk_rows=10)
    num_targets = int((targets_BS != -100).sum())
    assert float(loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=TOLERANCE)
    for objective in (loss, chunked.total / num_targets):
        model.zero_grad(set_to_none=True)
        objective.backward()
        gradients = hf_state_dict(model, gradients=True)
        compared = 0
        for name, parameter in peer.named_parameters():
            if name.endswith("expert_bias"):
                assert parameter.grad is None  # the bias takes part in the choice only
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            assert _relative(gradients[name], parameter.grad) < TOLERANCE, name
            compared += 1
        num_moe = config.num_hidden_layers - config.num_dense_layers
        assert compared == len(list(pieces(config, "fused"))) - num_moe


def test_the_comparison_notices_a_wrong_model() -> None:
    """Small changes in places that no shape check reaches must not slip through the tolerance."""
    model, peer = _pair(_config(), "eager")
    tokens_BS = torch.randint(0, 131, (1, 20))
    theirs = peer(input_ids=tokens_BS).logits
    layer = model.backbone.layers["2"]
    for tensor, factor in (
        (layer.mixer.gate_proj.weight, 1.01),
        (layer.mixer.q_norm.weight, 1.01),
        (layer.mixer_post_norm.weight, 1.01),
        (layer.ffn.router.weight, 1.01),
        (layer.ffn.router.expert_bias, 0.0),
        (layer.ffn.experts.gate_up, 1.01),
        (layer.ffn.shared.up_proj.weight, 1.01),
    ):
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(factor)
            assert _relative(model(tokens_BS), theirs) > 10 * TOLERANCE
            tensor.copy_(before)
    assert _relative(model(tokens_BS), theirs) < TOLERANCE
    for changes in ({"mup_enabled": False}, {"sliding_window": 8}, {"route_scale": 2.45}):
        other = LanguageModel.on_meta(_config(**changes)).to_empty(device="cpu")
        other.load_state_dict(model.state_dict())
        assert _relative(other(tokens_BS), theirs) > 10 * TOLERANCE, changes


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_greedy_generation_is_token_equal_over_64_tokens(experts: str) -> None:
    model, peer = _pair(_config(), experts)
    prompt_BS = torch.randint(0, 131, (2, 11))
    theirs = peer.generate(
        prompt_BS, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ours = generate(model, prompt_BS, max_new_tokens=64)
    assert ours.shape == (2, 75)
    assert torch.equal(ours, theirs)
    assert len(ours[:, 11:].unique()) > 20  # not one token over and over
