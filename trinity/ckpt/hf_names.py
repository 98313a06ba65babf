"""Names of AFMoE tensors: ours, and Hugging Face's in both layouts of the experts.

``per_expert`` is what released checkpoints and ``save_pretrained`` hold; ``fused`` is what
transformers keeps in memory since 5.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from trinity.core.config import ModelConfig

Layout = Literal["per_expert", "fused"]

OUTSIDE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "backbone.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_EVERY_LAYER = {
    "mixer_pre_norm.weight": "input_layernorm.weight",
    # "post_attention_layernorm" closes the attention branch here; it is not Llama's norm.
    "mixer_post_norm.weight": "post_attention_layernorm.weight",
    "ffn_pre_norm.weight": "pre_mlp_layernorm.weight",
    "ffn_post_norm.weight": "post_mlp_layernorm.weight",
    **{
        f"mixer.{name}.weight": f"self_attn.{name}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "o_proj", "q_norm", "k_norm")
    },
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_BIAS = "ffn.router.expert_bias"


class Piece(NamedTuple):
    """One tensor on disk and where it comes from."""

    hf_name: str
    our_name: str
    expert: int | None = None
    """Index into the stack, for one expert's matrix."""
    half: int | None = None
    """0 gate or 1 up, for one half of ``gate_up``."""
    is_fused: bool = False
    """Whether dims 1 and 2 of ``gate_up`` are one on disk."""


def pieces(config: ModelConfig, layout: Layout) -> Iterator[Piece]:
    """Every tensor of a checkpoint of this shape, in an order that reads each of ours once."""
    for ours, theirs in OUTSIDE.items():
        yield Piece(theirs, ours)
    for layer in range(config.num_hidden_layers):
        our, hf = f"backbone.layers.{layer}.", f"model.layers.{layer}."
        for ours, theirs in IN_EVERY_LAYER.items():
            yield Piece(hf + theirs, our + ours)
        if config.ffn_types[layer] == "dense":
            for name in PROJECTIONS:
                yield Piece(f"{hf}mlp.{name}.weight", f"{our}ffn.{name}.weight")
        else:
            yield from _moe_pieces(config, our, hf, layout)


def _moe_pieces(config: ModelConfig, our: str, hf: str, layout: Layout) -> Iterator[Piece]:
    yield Piece(f"{hf}mlp.router.gate.weight", f"{our}ffn.router.weight")
    yield Piece(f"{hf}mlp.expert_bias", our + EXPERT_BIAS)
    if config.num_shared_experts:
        for name in PROJECTIONS:
            yield Piece(f"{hf}mlp.shared_experts.{name}.weight", f"{our}ffn.shared.{name}.weight")
    gate_up, down = f"{our}ffn.experts.gate_up", f"{our}ffn.experts.down"
    if layout == "fused":
        yield Piece(f"{hf}mlp.experts.gate_up_proj", gate_up, is_fused=True)
        yield Piece(f"{hf}mlp.experts.down_proj", down)
        return
    for expert in range(config.num_experts):
        for half, name in enumerate(("gate_proj", "up_proj")):
            yield Piece(f"{hf}mlp.experts.{expert}.{name}.weight", gate_up, expert, half)
    for expert in range(config.num_experts):
        yield Piece(f"{hf}mlp.experts.{expert}.down_proj.weight", down, expert)


def num_pieces(config: ModelConfig, layout: Layout) -> int:
    """How many there are, without listing them: a hostile config may claim a billion layers."""
    num_moe_layers = len(config.moe_layers)
    experts = 2 if layout == "fused" else 3 * config.num_experts
    shared = len(PROJECTIONS) if config.num_shared_experts else 0
    return (
        len(OUTSIDE)
        + config.num_hidden_layers * len(IN_EVERY_LAYER)
        + (config.num_hidden_layers - num_moe_layers) * len(PROJECTIONS)
        + num_moe_layers * (2 + shared + experts)
    )
