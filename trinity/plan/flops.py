"""Model FLOPs of any family, read off the shapes that a plan has."""

from __future__ import annotations

import math
from functools import lru_cache

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import BackboneConfig, ModelConfig
from trinity.plan.case import Case
from trinity.plan.mixers import MixerShape
from trinity.plan.shapes import ModelShape

ONCE_PER_IMAGE = ("adaln.modulation", "ffn.router.time_weight")


def model_flops_per_token(case: Case) -> float:
    """Forward and backward FLOPs of the model for one token, of any family.

    Equals :func:`trinity.models.flops.train_flops_per_token` for this program's models. Of images
    it leaves out what that does: what is done once per image, and what the second way of a scan
    has for itself.
    """
    return _flops_per_token(case.shape, case.reach)


@lru_cache(maxsize=64)
def _flops_per_token(shape: ModelShape, length: int) -> float:
    config = shape.config
    multiplies = float(_end_multiplies(config))
    for kind, count in shape.kinds_of(range(config.num_hidden_layers)):
        for weight in kind.weights:
            if len(weight.shape) == 1 or weight.name in ONCE_PER_IMAGE:
                continue
            if ".reverse." in weight.name:
                continue
            elements = math.prod(weight.shape)
            if weight.group == "experts":
                elements = elements * config.num_experts_per_tok / config.num_experts
            multiplies += count * elements
        mixer = kind.mixer
        multiplies += count * mixer.ways * mixer.recurrent_multiplies
        if mixer.sees_tokens:
            keys = mixer.ways * _mean_keys(mixer, length)
            multiplies += count * keys * (mixer.query + mixer.output)
    return 6 * multiplies


def _end_multiplies(config: BackboneConfig) -> int:
    """Multiply-adds per token before and after the blocks, forward."""
    if isinstance(config, DiTConfig):
        return 2 * config.hidden_size * sum(config.patch_values)
    assert isinstance(config, ModelConfig)
    return config.hidden_size * config.vocab_size


def _mean_keys(mixer: MixerShape, length: int) -> float:
    """Keys that a token sees in one way, on average."""
    if not mixer.is_causal:
        return length if mixer.window is None else min(mixer.window**2, length)
    reach = length if mixer.window is None else min(mixer.window, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length
