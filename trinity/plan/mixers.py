"""What a token mixer works on, per token: attention of both reaches, and linear-time scans."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trinity.core.model_config import PRESETS, ModelConfig
from trinity.ops.chunked_scan import CHUNK_TOKENS
from trinity.ops.squared_scan import usual_chunk_tokens

FP32 = 4


@dataclass(frozen=True)
class MixerShape:
    """Elements per token, all heads together."""

    query: int
    key: int
    value: int
    output: int
    num_heads: int
    is_gated: bool
    """Whether a gate of the output's size multiplies it."""
    window: int | None = None
    """Keys that a token sees; None is all. Without meaning for a scan."""
    sees_tokens: bool = True
    """Attention; False for a scan, whose past is a state, and where there is no mixer."""
    scan_multiplies: float = 0.0
    """Multiply-adds per token of a scan in chunks, forward."""
    recurrent_multiplies: float = 0.0
    """The same as a recurrence: what counts as FLOPs of the model."""
    state: int = 0
    """Elements of the state of a row, and of the decay that goes with it between ranks."""
    saved_states: float = 0.0
    """Elements of states that are kept for the backward, per token, fp32."""


NO_MIXER = MixerShape(0, 0, 0, 0, 0, False, sees_tokens=False)


def mixer_shape(config: ModelConfig, layer: int, other: MixerShape | None = None) -> MixerShape:
    """The mixer of a layer; ``other`` is the attention of a model of another family."""
    layer_type = config.layer_types[layer]
    if layer_type == "none":
        return NO_MIXER
    if layer_type == "mamba2":
        return _mamba2(config)
    if layer_type in PRESETS:
        return _linear(config, layer_type)
    attention = other
    if attention is None:
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        heads = config.num_attention_heads
        attention = MixerShape(query, key, key, query, heads, is_gated=True)
    window = config.sliding_window if layer_type == "sliding_attention" else None
    return replace(attention, window=window)


def _mamba2(config: ModelConfig) -> MixerShape:
    """Scores once per group; weights times values, and states made and read, per head."""
    mamba2, heads = config.mamba2, config.mamba2_heads
    shared, inner = mamba2.num_groups * mamba2.state_dim, heads * mamba2.head_dim
    state = inner * mamba2.state_dim
    inside = CHUNK_TOKENS * (shared + inner)
    return MixerShape(
        shared,
        shared,
        inner,
        inner,
        heads,
        is_gated=True,
        sees_tokens=False,
        scan_multiplies=inside + 2 * state,
        recurrent_multiplies=2 * state,
        state=state + heads,
        saved_states=state / CHUNK_TOKENS,
    )


def _linear(config: ModelConfig, layer_type: str) -> MixerShape:
    (heads, kv_heads), dim = config.linear_heads, config.linear.head_dim
    options = config.linear.options(layer_type)
    shape = MixerShape(heads * dim, kv_heads * dim, kv_heads * dim, heads * dim, heads, False)
    if options.power == "exp":
        return shape
    chunk, features, column = CHUNK_TOKENS, dim, 0
    if options.power == 2:
        chunk, features = usual_chunk_tokens(dim), dim * (dim + 1) // 2
        column = 1 if options.norm == "sum" else 0
    state = kv_heads * features * (dim + column)
    return replace(
        shape,
        sees_tokens=False,
        scan_multiplies=chunk * 2 * heads * dim + (heads + kv_heads) * features * (dim + column),
        recurrent_multiplies=(heads + kv_heads) * features * dim,
        state=state + kv_heads,
        saved_states=state / chunk if options.power == 1 else 0.0,
    )
