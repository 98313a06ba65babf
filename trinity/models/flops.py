"""Model FLOPs, the numerator of model FLOP utilisation (MFU)."""

from __future__ import annotations

from trinity.core.config import ModelConfig

BACKWARD_FACTOR = 3
"""Forward + backward cost of a matrix product, in forward products. Recompute does not count."""


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Matrix-product FLOPs to train on one token of a row of ``sequence_length``.

    Counts two FLOPs per multiply-add and only the attention scores inside the causal or window
    mask; document masks, which only remove work, are not looked at, so this is an upper bound for
    packed rows.
    """
    width = config.hidden_size
    heads_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    num_moe_layers = config.num_hidden_layers - config.num_dense_layers
    projections = config.num_hidden_layers * width * (3 * heads_width + 2 * kv_width)
    dense = config.num_dense_layers * 3 * width * config.intermediate_size
    experts_per_token = config.num_experts_per_tok + config.num_shared_experts
    expert = 3 * width * config.moe_intermediate_size
    experts = num_moe_layers * (experts_per_token * expert + width * config.num_experts)
    head = width * config.vocab_size
    scores = sum(
        2 * heads_width * _mean_keys(kind == "sliding_attention", config, sequence_length)
        for kind in config.layer_types
    )
    return 2 * BACKWARD_FACTOR * (projections + dense + experts + head + scores)


def _mean_keys(local: bool, config: ModelConfig, sequence_length: int) -> float:
    """Keys that a token of the row sees, on average."""
    window = min(config.sliding_window, sequence_length) if local else sequence_length
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
