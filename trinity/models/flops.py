"""Model FLOPs, the numerator of model FLOP utilisation (MFU)."""

from __future__ import annotations

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import PRESETS, BackboneConfig, ModelConfig

BACKWARD_FACTOR = 3
"""Forward + backward cost of a matrix product, in forward products. Recompute does not count."""


def train_flops_per_token(config: BackboneConfig, sequence_length: int) -> float:
    """Matrix-product FLOPs to train on one token of a row of ``sequence_length``.

    Counts two FLOPs per multiply-add and only the attention scores inside the causal or window
    mask; document masks, which only remove work, are not looked at, so this is an upper bound for
    packed rows. For images the length is that of one image, at the base patch.
    """
    return BACKWARD_FACTOR * forward_flops_per_token(config, sequence_length)


def forward_flops_per_token(config: BackboneConfig, sequence_length: int) -> float:
    """The same of a forward pass alone."""
    width = config.hidden_size
    experts_per_token = config.num_experts_per_tok + config.num_shared_experts
    feed_forward = {
        "dense": 3 * width * config.intermediate_size,
        "moe": 3 * width * config.moe_intermediate_size * experts_per_token
        + width * config.num_experts,
        "none": 0,
    }
    layers = sum(
        _mixer(config, mixer, sequence_length) + feed_forward[ffn]
        for mixer, ffn in zip(config.layer_types, config.ffn_types, strict=True)
    )
    return 2 * (layers + _ends(config))


def _ends(config: BackboneConfig) -> float:
    """Multiply-adds per token before and after the blocks; what is done once per image is not
    counted."""
    if isinstance(config, DiTConfig):
        return 2 * config.hidden_size * sum(config.patch_values)
    assert isinstance(config, ModelConfig)
    return config.hidden_size * config.vocab_size


def _mixer(config: BackboneConfig, layer_type: str, sequence_length: int) -> float:
    """Multiply-adds per token of a token mixer, forward. Linear-time layers count as recurrences:
    a token is added to the state of each head and read from it. For images both ways are
    counted, but not the second convolutions and rates, which are small."""
    width, ways = config.hidden_size, 2 if config.is_image else 1
    if layer_type == "none":
        return 0
    if layer_type == "mamba2":
        inner = config.mamba2_heads * config.mamba2.head_dim
        shared = config.mamba2.num_groups * config.mamba2.state_dim
        projections = width * (3 * inner + 2 * shared + config.mamba2_heads)
        if config.mamba2.conv_width > 1:
            projections += config.mamba2.conv_width * (inner + 2 * shared)
        return projections + ways * 2 * inner * config.mamba2.state_dim
    if layer_type in PRESETS:
        heads, kv_heads = config.linear_heads
        dim, options = config.linear.head_dim, config.linear.options(layer_type)
        num_rates = (options.decay != "none") + (options.value_dt and options.decay != "mamba2")
        projections = width * (2 * heads * dim + 2 * kv_heads * dim + num_rates * kv_heads)
        if config.linear.conv_width > 1:
            projections += config.linear.conv_width * dim * (heads + 2 * kv_heads)
        if options.power == "exp":
            keys = ways * _mean_keys(False, config, sequence_length, causal=True)
            return projections + 2 * heads * dim * keys
        features = dim if options.power == 1 else dim * (dim + 1) // 2
        return projections + ways * (heads + kv_heads) * features * dim
    heads_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    local = layer_type == "sliding_attention"
    mean_keys = _mean_keys(local, config, sequence_length, causal=not config.is_image)
    return width * (3 * heads_width + 2 * kv_width) + 2 * heads_width * mean_keys


def _mean_keys(local: bool, config: BackboneConfig, sequence_length: int, *, causal: bool) -> float:
    """Keys that a token of the row sees, on average; of an image's square those that lie outside
    the image are counted too."""
    if not causal:
        return min(config.sliding_window**2, sequence_length) if local else sequence_length
    window = min(config.sliding_window, sequence_length) if local else sequence_length
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
