"""``[model]``: the shape of a model. Keys carry the names of Hugging Face's AFMoE ``config.json``
where one exists, so that a key means the same in both places.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from trinity.core.layer_pattern import parse_layer_pattern
from trinity.core.tables import NonNegative, Positive, PositiveFloat, Table

MAX_LAYERS = 10_000
"""No model has more; a configuration that claims a billion must not be expanded first."""

LayerType = Literal[
    "sliding_attention", "full_attention", "mamba2", "mamba2s", "2mamba", "2mamba_e", "none"
]
FeedForwardType = Literal["dense", "moe", "none"]
Power = Literal[1, 2, "exp"]
Norm = Literal["rms", "sum"]
Decay = Literal["softplus", "mamba2", "none"]


class Mamba2Config(Table):
    """Layers of type ``mamba2`` (arXiv 2405.21060)."""

    num_heads: NonNegative = Field(default=0, description="0: 2 * hidden_size / head_dim")
    head_dim: Positive = 64
    state_dim: Positive = Field(default=128, description="width of B and C")
    num_groups: Positive = Field(default=1, description="heads of B and C, and groups of the norm")
    conv_width: Positive = Field(default=4, description="taps of the convolution; 1 is none")
    conv_bias: bool = True


class LinearOptions(NamedTuple):
    """What tells the layers of the simplified family apart."""

    power: Power
    """Of q . k in a token's weight; "exp" is softmax attention that forgets."""
    norm: Norm
    """RMSNorm of the output, or division by the sum of the weights."""
    value_dt: bool
    """Values are scaled by a learned step."""
    decay: Decay
    """softplus: of a projection. mamba2: a step times a learned rate. none: never forgets."""


PRESETS = {
    "mamba2s": LinearOptions(1, "rms", True, "softplus"),
    "2mamba": LinearOptions(2, "sum", False, "softplus"),
    "2mamba_e": LinearOptions("exp", "sum", False, "softplus"),
}
"""Mamba-2S, 2Mamba and 2Mamba-E (arXiv 2602.17363)."""


class LinearConfig(Table):
    """Layers of types ``mamba2s``, ``2mamba`` and ``2mamba_e`` (arXiv 2602.17363).

    The last four keys override what the type stands for, in all such layers.
    """

    num_heads: NonNegative = Field(default=0, description="query heads; 0: hidden_size / head_dim")
    num_kv_heads: NonNegative = Field(
        default=0, description="heads of keys, values and decays; 0: as many as query heads"
    )
    head_dim: Positive = 64
    conv_width: Positive = Field(default=2, description="taps of the convolution; 1 is none")
    conv_bias: bool = True
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys, per head")
    norm_groups: Positive = Field(
        default=1,
        description="groups of channels that the output norm treats apart; tensor parallelism "
        "needs a multiple of tp",
    )
    decay_bias: Literal["none", "log_spaced"] = Field(
        default="none", description="heads start with half-lives from 1 to 1000 tokens"
    )
    power: Power | None = None
    norm: Norm | None = None
    value_dt: bool | None = None
    decay: Decay | None = None

    def options(self, layer_type: str) -> LinearOptions:
        """The preset of a layer type with the overrides."""
        preset = PRESETS[layer_type]._asdict()
        own = {name: getattr(self, name) for name in preset}
        return LinearOptions(**{k: preset[k] if v is None else v for k, v in own.items()})


class BackboneConfig(Table):
    """Shape of the stack of blocks (Trinity technical report, table 1)."""

    is_image: ClassVar[bool] = False
    """Whether tokens are patches of images, which see what comes after them too."""

    hidden_size: Positive = Field(description="model width D")
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    num_dense_layers: NonNegative = Field(
        default=0, description="leading layers with a dense feed-forward"
    )
    intermediate_size: Positive = Field(description="width of a dense feed-forward")
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive = Field(description="even; not necessarily D / heads")
    num_experts: Positive = Field(description="routed experts per layer")
    num_experts_per_tok: Positive = Field(description="routed experts each token visits")
    moe_intermediate_size: Positive = Field(description="width of one expert")
    num_shared_experts: NonNegative = 1
    route_scale: PositiveFloat = Field(description="factor on the normalised routing weights")
    sliding_window: Positive = Field(description="keys a local layer sees, the token included")
    global_attn_every_n_layers: Positive = 4
    layer_pattern: str = Field(
        default="",
        description="one character per sublayer, as in Megatron-LM and Nemotron-H: * full and W "
        "sliding attention, M mamba2, S mamba2s, 2 2mamba, X 2mamba_e, - dense, E experts; "
        "stands for num_hidden_layers, layer_types and ffn_types",
    )
    layer_types: tuple[LayerType, ...] = Field(
        default=(),
        description="token mixer of each layer; from global_attn_every_n_layers when absent",
    )
    ffn_types: tuple[FeedForwardType, ...] = Field(
        default=(), description="feed-forward of each layer; from num_dense_layers when absent"
    )
    mamba2: Mamba2Config = Mamba2Config()
    linear: LinearConfig = LinearConfig()
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat | None = Field(default=None, description="None means 0.5 / sqrt(D)")

    @model_validator(mode="before")
    @classmethod
    def _fill_layers(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        pattern = values.get("layer_pattern")
        if isinstance(pattern, str) and pattern:
            mixers, feed_forwards = parse_layer_pattern(pattern)
            filled = {
                "num_hidden_layers": len(mixers),
                "layer_types": mixers,
                "ffn_types": feed_forwards,
            }
            for key, value in filled.items():
                given = values.get(key)
                given = tuple(given) if isinstance(given, list) else given
                if given and given != value:
                    raise ValueError(f"layer_pattern={pattern!r} already sets {key}; leave it out")
            return {**values, **filled}
        num_layers, every = (
            values.get("num_hidden_layers"),
            values.get("global_attn_every_n_layers", 4),
        )
        if not isinstance(num_layers, int) or not isinstance(every, int) or every < 1:
            return values
        num_layers = min(num_layers, MAX_LAYERS)
        filled = dict(values)
        if not values.get("layer_types"):
            filled["layer_types"] = [
                "full_attention" if (i + 1) % every == 0 else "sliding_attention"
                for i in range(num_layers)
            ]
        num_dense = values.get("num_dense_layers", 0)
        if not values.get("ffn_types") and isinstance(num_dense, int):
            filled["ffn_types"] = ["dense" if i < num_dense else "moe" for i in range(num_layers)]
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("layer_types", "ffn_types"):
            entries = getattr(self, key)
            if len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{key} has {len(entries)} entries for num_hidden_layers="
                    f"{self.num_hidden_layers}; give one per layer or leave it out"
                )
        if self.num_dense_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} exceeds "
                f"num_hidden_layers={self.num_hidden_layers}; lower it"
            )
        if any(kind != "dense" for kind in self.ffn_types[: self.num_dense_layers]):
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} contradicts ffn_types; give one of them"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"num_experts={self.num_experts}; lower it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        if "mamba2" in self.layer_types:
            self._check_mamba2()
        for layer_type in PRESETS.keys() & set(self.layer_types):
            self._check_linear(layer_type)
        return self

    def _check_mamba2(self) -> None:
        width, dim = 2 * self.hidden_size, self.mamba2.head_dim
        if not self.mamba2.num_heads and width % dim:
            raise ValueError(f"mamba2.head_dim={dim} does not divide 2 * hidden_size={width}")
        if self.mamba2_heads % self.mamba2.num_groups:
            raise ValueError(
                f"mamba2.num_groups={self.mamba2.num_groups} does not divide the "
                f"{self.mamba2_heads} heads; choose a divisor"
            )

    def _check_linear(self, layer_type: str) -> None:
        linear = self.linear
        if not linear.num_heads and self.hidden_size % linear.head_dim:
            raise ValueError(
                f"linear.head_dim={linear.head_dim} does not divide hidden_size="
                f"{self.hidden_size}; set linear.num_heads"
            )
        heads, kv_heads = self.linear_heads
        if heads % kv_heads:
            raise ValueError(f"linear.num_kv_heads={kv_heads} does not divide the {heads} heads")
        if heads * linear.head_dim % linear.norm_groups:
            raise ValueError(
                f"linear.norm_groups={linear.norm_groups} does not divide the "
                f"{heads * linear.head_dim} channels"
            )
        options = linear.options(layer_type)
        if (options.norm == "sum") != (options.power != 1) and options.power != 2:
            raise ValueError(
                f"linear.power={options.power!r} with linear.norm={options.norm!r}: weights of "
                'power 1 can be negative and need norm="rms", those of "exp" need norm="sum"'
            )

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial weights (report, eqs. 37-38)."""
        return self.init_std if self.init_std is not None else 0.5 / math.sqrt(self.hidden_size)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return tuple(i for i, kind in enumerate(self.ffn_types) if kind == "moe")

    @property
    def mamba2_heads(self) -> int:
        """Heads of a ``mamba2`` layer."""
        return self.mamba2.num_heads or 2 * self.hidden_size // self.mamba2.head_dim

    @property
    def linear_heads(self) -> tuple[int, int]:
        """Query heads and key/value heads of a layer of the simplified family."""
        heads = self.linear.num_heads or self.hidden_size // self.linear.head_dim
        return heads, self.linear.num_kv_heads or heads


class ModelConfig(BackboneConfig):
    """Shape of a language model of the AFMoE family."""

    vocab_size: Positive = Field(description="rows of the embedding and of the head")
    mup_enabled: bool = Field(default=True, description="scale the embedding by sqrt(D)")
    max_position_embeddings: Positive = 131_072
