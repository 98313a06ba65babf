"""``config.json`` of ``AfmoeForCausalLM``: reading it strictly, writing it completely."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trinity.ckpt.manifest import read_json, write_synced
from trinity.core.config import ModelConfig
from trinity.core.errors import CheckpointError

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 10 << 20
MODEL_TYPE = "afmoe"
# Keys that mean the same in both and have no safe default: transformers' class defaults match no
# released model.
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_dense_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "route_scale",
    "sliding_window",
    "rms_norm_eps",
    "mup_enabled",
    "max_position_embeddings",
)
OPTIONAL_KEYS = ("global_attn_every_n_layers", "layer_types")
# Values under which the model would compute something else than we do.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "score_func": ("sigmoid",),
    "route_norm": (True,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "num_expert_groups": (1, None),
    "num_limited_groups": (1, None),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
MAX_DIMENSION = 1 << 40
"""Of any number in the shape: products of a few stay within what torch can describe."""


def read_hf_config(directory: Path) -> ModelConfig:
    """The model's shape from ``directory/config.json``.

    Legacy (``rope_theta``) and new (``rope_parameters``) keys are understood. Raises
    CheckpointError naming a key that is missing or has a value that is not supported.
    """
    path = directory / CONFIG_FILE
    values = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {values.get('model_type')!r}; only {MODEL_TYPE!r} is supported"
        )
    for key in REQUIRED_KEYS:
        if values.get(key) is None:
            raise CheckpointError(f"{path}: key {key} is missing; write the model's real value")
    for key, supported in ONLY_SUPPORTED.items():
        if key in values and values[key] not in supported:
            raise CheckpointError(
                f"{path}: {key}={values[key]!r} is not supported, only {supported[0]!r}; this "
                "model would compute something else, convert it with its own tools first"
            )
    for key in REQUIRED_KEYS:
        if isinstance(values[key], int) and values[key] > MAX_DIMENSION:
            raise CheckpointError(f"{path}: {key}={values[key]} is beyond any model; refused")
    taken = {key: values[key] for key in REQUIRED_KEYS}
    taken |= {key: values[key] for key in OPTIONAL_KEYS if values.get(key) is not None}
    try:
        return ModelConfig.model_validate({**taken, "rope_theta": _rope_theta(path, values)})
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"]) or "config"
        raise CheckpointError(f"{path}: {key}: {detail['msg']}") from None


def write_hf_config(
    directory: Path, config: ModelConfig, *, dtype: str, bos: int | None, eos: int | None
) -> None:
    """Write ``config.json`` and ``generation_config.json`` with every key that any reader wants.

    Older readers take score_func, route_norm and rope_theta as attributes, newer ones
    rope_parameters; both are there. ``bos`` and ``eos`` are None without a tokenizer. Raises
    CheckpointError for a model that AFMoE is not.
    """
    check_is_afmoe(config)
    values = {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in REQUIRED_KEYS},
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "layer_types": list(config.layer_types),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": dtype,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "initializer_range": config.weight_std,
        "n_group": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "output_router_logits": False,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "route_norm": True,
        "score_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
    }
    _write_json(directory / CONFIG_FILE, values)
    generation = {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos}
    _write_json(directory / "generation_config.json", generation)


def check_is_afmoe(config: ModelConfig) -> None:
    """Raises CheckpointError when a layer is none of AFMoE's, which has no name for it."""
    num_dense = config.num_dense_layers
    expected = ("dense",) * num_dense + ("moe",) * (config.num_hidden_layers - num_dense)
    foreign = set(config.layer_types) - {"sliding_attention", "full_attention"}
    if foreign or config.ffn_types != expected:
        what = f"layer_types holds {min(foreign)!r}" if foreign else "ffn_types is not dense first"
        raise CheckpointError(
            f"{what}: only models of sliding_attention and full_attention layers, dense ones "
            "first, have a Hugging Face AFMoE form; keep the trinity checkpoint"
        )


def _rope_theta(path: Path, values: dict[str, Any]) -> float:
    """The rotary base, from the new key, the legacy one, or both when they agree."""
    parameters = values.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path}: rope_parameters={parameters!r} is not an object")
    for key in ("rope_type", "type"):
        if (kind := parameters.get(key, "default")) != "default":
            raise CheckpointError(f"{path}: {key}={kind!r} is not supported, only 'default'")
    if more := sorted(parameters.keys() - {"rope_theta", "rope_type", "type"}):
        raise CheckpointError(
            f"{path}: rope_parameters.{more[0]}={parameters[more[0]]!r} is not supported; only a "
            "plain rope_theta is"
        )
    found: set[float] = set()
    for theta in (parameters.get("rope_theta"), values.get("rope_theta")):
        if theta is None:
            continue
        if type(theta) not in (int, float) or not 0 < theta < math.inf:
            raise CheckpointError(f"{path}: rope_theta={theta!r} is not a positive number")
        found.add(theta)
    if not found:
        raise CheckpointError(f"{path}: key rope_theta is missing; the released models have 10000")
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: rope_theta={values['rope_theta']} contradicts rope_parameters.rope_theta="
            f"{parameters['rope_theta']}; keep the one the model was trained with"
        )
    return found.pop()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_synced(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
