"""A model of the kind that a configuration describes."""

from __future__ import annotations

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import BackboneConfig, ModelConfig
from trinity.models.dit import DiffusionTransformer
from trinity.models.lm import LanguageModel
from trinity.models.lm import parameter_counts as _of_language
from trinity.models.staged import StagedModel


def model_on_meta(config: BackboneConfig) -> StagedModel:
    """A language model or a diffusion transformer, its shapes without its memory."""
    if isinstance(config, DiTConfig):
        return DiffusionTransformer.on_meta(config)
    assert isinstance(config, ModelConfig)
    return LanguageModel.on_meta(config)


def parameter_counts(config: BackboneConfig) -> dict[str, int]:
    """Parameters by name of the group, total and active per token, counted on meta tensors.

    Of images ``active`` leaves out the experts that a token does not visit and the table of
    classes, which is a look-up. ``condition`` is what is computed once per image, the table
    included; ``patches`` are both ends.
    """
    if isinstance(config, ModelConfig):
        return _of_language(config)
    model = model_on_meta(config)
    assert isinstance(model, DiffusionTransformer)
    assert model.condition is not None
    experts = sum(p.numel() for moe in model.moe_layers() for p in moe.experts.parameters())
    biases = sum(moe.router.expert_bias.numel() for moe in model.moe_layers())
    total = sum(p.numel() for p in model.parameters()) + biases
    idle = experts - experts * config.num_experts_per_tok // config.num_experts
    condition = sum(p.numel() for p in model.condition.parameters())
    classes = model.condition.classes
    return {
        "total": total,
        "active": total - idle - (classes.weight.numel() if classes is not None else 0),
        "condition": condition,
        "patches": sum(p.numel() for end in model.ends() for p in end.parameters()) - condition,
        "routed_experts": experts,
    }
