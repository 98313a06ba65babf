"""What a token mixer works on, per token: attention of both reaches, and linear-time scans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import PRESETS, BackboneConfig
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
    """Keys that a token sees, of images the side of their square; None is all. Without meaning for
    a scan."""
    is_causal: bool = True
    """Whether a token sees what comes before it only."""
    ways: int = 1
    """Passes over the row: 2 for what is read forward and backward."""
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
    family: Literal["attention", "linear", "mamba2"] = "attention"
    """What its module is; 2Mamba-E is linear, although it sees tokens."""
    num_rates: int = 0
    """Projections for decays and steps, each of which keeps its input in fp32."""
    takes_steps: bool = False
    """Values are multiplied by a step."""
    norm_groups: int = 0
    """Of the norm of the output; 0: none."""

    @property
    def is_fused(self) -> bool:
        """Whether its attention is one of PyTorch's, which selective recompute keeps."""
        return self.sees_tokens and (self.window is None or not self.is_causal)


NO_MIXER = MixerShape(0, 0, 0, 0, 0, False, sees_tokens=False)


def mixer_shape(config: BackboneConfig, layer: int, other: MixerShape | None = None) -> MixerShape:
    """The mixer of a layer; ``other`` is the attention of a model of another family.

    What is said of scans is said of one way.
    """
    layer_type = config.layer_types[layer]
    is_image = isinstance(config, DiTConfig)
    ways = 2 if is_image else 1
    if layer_type == "none":
        return NO_MIXER
    if layer_type == "mamba2":
        return replace(_mamba2(config), ways=ways)
    if layer_type in PRESETS:
        return replace(_linear(config, layer_type), ways=ways)
    attention = other
    if attention is None:
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        heads = config.num_attention_heads
        attention = MixerShape(query, key, key, query, heads, is_gated=True)
    window = config.sliding_window if layer_type == "sliding_attention" else None
    return replace(attention, window=window, is_causal=not is_image)


def _mamba2(config: BackboneConfig) -> MixerShape:
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
        family="mamba2",
        num_rates=1,
        takes_steps=True,
        norm_groups=mamba2.num_groups,
    )


def _linear(config: BackboneConfig, layer_type: str) -> MixerShape:
    (heads, kv_heads), dim = config.linear_heads, config.linear.head_dim
    options = config.linear.options(layer_type)
    shape = MixerShape(
        heads * dim,
        kv_heads * dim,
        kv_heads * dim,
        heads * dim,
        heads,
        False,
        family="linear",
        num_rates=(options.decay != "none") + (options.value_dt and options.decay != "mamba2"),
        takes_steps=options.value_dt,
        norm_groups=config.linear.norm_groups if options.norm == "rms" else 0,
    )
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
