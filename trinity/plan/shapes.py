"""Parameter shapes of a model, and how many elements of each a layout leaves on a rank.

The shapes are read off the real model on the meta device, so that they cannot drift from it. Blocks
that are alike share one :class:`BlockShape`. Models of other families differ in the matrices of the
mixer, which can be given by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from trinity.core.config import OptimConfig
from trinity.core.model_config import BackboneConfig
from trinity.models.build import model_on_meta
from trinity.models.staged import StagedModel
from trinity.nn.patch_ends import ImageCondition
from trinity.optim.groups import parameter_table
from trinity.parallel.mesh import Layout, expert_shard_dim
from trinity.parallel.tensor import CUT_BY_COLUMNS, CUT_BY_ROWS
from trinity.plan.mixers import MixerShape, mixer_shape

CUT_INTO_WORDS = ("embed_tokens", "lm_head")
Group = Literal["matrices", "experts", "exact", "ends"]
"""Which FSDP group a parameter belongs to: its block's matrices, its block's experts, norms and
routers (gathered in fp32), or one of the ends: embedding and head, or those of images."""


class Weight(NamedTuple):
    """One parameter tensor."""

    name: str
    shape: tuple[int, ...]
    group: Group
    tp_dim: int | None
    """The dim that tensor parallelism cuts, None where every rank of it holds all."""
    is_muon: bool

    def gathered_shape(self, layout: Layout) -> tuple[int, ...]:
        """What a rank computes with: after tensor and expert parallelism, before FSDP."""
        shape = list(self.shape)
        if self.group == "experts":
            shape[0] //= layout.ep
        elif self.tp_dim is not None:
            shape[self.tp_dim] //= layout.tp
        return tuple(shape)

    def shards(self, layout: Layout) -> int:
        """Ranks that FSDP spreads it over."""
        return layout.expert_fsdp if self.group == "experts" else layout.fsdp

    def fsdp_dim(self, layout: Layout) -> int:
        """The dim that FSDP cuts: 0, or the width of experts too few to be dealt out whole."""
        if self.group != "experts":
            return 0
        width = self.shape[2]
        dim = expert_shard_dim(self.shape[0] // layout.ep, width, layout.expert_fsdp)
        return 2 if dim == -2 else 0

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """What the first rank stores, which is the most: FSDP pads the last ranks up to it."""
        shape = list(self.gathered_shape(layout))
        dim = self.fsdp_dim(layout)
        shape[dim] = -(-shape[dim] // self.shards(layout))
        return tuple(shape)

    def muon_axes(self, layout: Layout) -> int:
        """Ranks that must exchange parts before its matrices are whole; 1 for none."""
        ranks = 1
        if len(self.shape) == 2 or self.fsdp_dim(layout) > 0:
            ranks *= self.shards(layout)
        return ranks * (layout.tp if self.tp_dim is not None else 1)


class Sizes(NamedTuple):
    """Elements of some parameters on one rank."""

    stored: int
    """Shards, padding included."""
    gathered: int
    """What collectives deliver and products use, padding included."""
    muon: int
    """Stored elements that Muon moves; the others are AdamW's."""
    num_adamw: int
    """Tensors, not elements, that AdamW moves."""

    def __add__(self, other: Sizes) -> Sizes:  # type: ignore[override]
        stored, gathered, muon, num_adamw = other
        return Sizes(
            self.stored + stored,
            self.gathered + gathered,
            self.muon + muon,
            self.num_adamw + num_adamw,
        )

    def times(self, count: int) -> Sizes:
        """As many of them."""
        return Sizes(*[count * a for a in self])


def sizes(weights: tuple[Weight, ...], layout: Layout, group: Group | None = None) -> Sizes:
    """Elements of those of ``weights`` that are in ``group`` (all, if None), on one rank."""
    total = Sizes(0, 0, 0, 0)
    for weight in weights:
        if group is not None and weight.group != group:
            continue
        stored = math.prod(weight.local_shape(layout))
        total += Sizes(
            stored,
            stored * weight.shards(layout),
            stored if weight.is_muon else 0,
            0 if weight.is_muon else 1,
        )
    return total


class EndGroup(NamedTuple):
    """Parameters outside the blocks that FSDP gathers together: those of one module."""

    weights: tuple[Weight, ...]
    is_exact: bool
    """Gathered in fp32 in any precision."""

    def sizes(self, layout: Layout) -> Sizes:
        """Elements on a rank."""
        return sizes(self.weights, layout)


@dataclass(frozen=True, eq=False)
class EndShape:
    """What comes before and after the blocks, or some of it, or nothing. Compared by identity."""

    groups: tuple[EndGroup, ...]
    norms: tuple[Weight, ...]
    has_first: bool
    """Whether what comes before the blocks is there: the embedding, or that of patches."""
    has_last: bool
    """Whether the head is."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All of them."""
        return (*(weight for group in self.groups for weight in group.weights), *self.norms)


@dataclass(frozen=True, eq=False)
class BlockShape:
    """Blocks that are alike in everything a plan looks at. Compared by identity, which is quick."""

    weights: tuple[Weight, ...]
    mixer: MixerShape
    feed_forward: str
    """"dense", "moe" or "none"."""
    _sizes: dict[tuple[Layout, Group | None], Sizes] = field(default_factory=dict, repr=False)

    def sizes(self, layout: Layout, group: Group | None = None) -> Sizes:
        """Elements of one block's parameters on a rank, of one group or all."""
        key = (layout, group)
        if key not in self._sizes:
            self._sizes[key] = sizes(self.weights, layout, group)
        return self._sizes[key]

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return self.feed_forward == "moe"

    def is_like(self, other: BlockShape) -> bool:
        """Whether a plan cannot tell the two apart."""
        mine = (self.weights, self.mixer, self.feed_forward)
        return mine == (other.weights, other.mixer, other.feed_forward)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Everything a plan needs to know of a model. Compared by identity."""

    config: BackboneConfig
    kinds: tuple[BlockShape, ...]
    kind_of_layer: tuple[int, ...]
    ends: dict[tuple[bool, bool], EndShape]
    """By whether the first and the last stage are there."""

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, balancing biases not counted."""
        weights = [*self.ends[True, True].weights]
        weights += [w for kind in self.kind_of_layer for w in self.kinds[kind].weights]
        return sum(math.prod(weight.shape) for weight in weights)

    def kinds_of(self, layers: Iterable[int]) -> tuple[tuple[BlockShape, int], ...]:
        """How many blocks of each kind are among ``layers``."""
        counts = [0] * len(self.kinds)
        for layer in layers:
            counts[self.kind_of_layer[layer]] += 1
        return tuple((kind, count) for kind, count in zip(self.kinds, counts, strict=True) if count)


class OtherMixer(NamedTuple):
    """The attention of a model of another family."""

    matrices: Mapping[str, tuple[int, int]]
    """Name to (out, in)."""
    attention: MixerShape


def model_shape(
    config: BackboneConfig, optim: OptimConfig, mixer: OtherMixer | None = None
) -> ModelShape:
    """The shape of a model whose optimizers are chosen by ``optim``."""
    model = model_on_meta(config)
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if mixer is not None:
        named = dict(_with_mixer(named, mixer))
    table = parameter_table(
        ((name, torch.empty(shape, device="meta")) for name, shape in named.items()), optim
    )
    weights = {row.name: _weight(row.name, row.shape, row.optimizer == "muon") for row in table}
    kinds: list[BlockShape] = []
    kind_of_layer: list[int] = []
    blocks: list[list[Weight]] = [[] for _ in range(config.num_hidden_layers)]
    for name, weight in weights.items():
        if name.startswith("backbone.layers."):
            _, _, layer, rest = name.split(".", 3)
            blocks[int(layer)].append(weight._replace(name=rest))
    for layer, block in enumerate(blocks):
        shape = mixer_shape(config, layer, None if mixer is None else mixer.attention)
        kind = BlockShape(tuple(block), shape, config.ffn_types[layer])
        alike = next((i for i, known in enumerate(kinds) if known.is_like(kind)), len(kinds))
        if alike == len(kinds):
            kinds.append(kind)
        kind_of_layer.append(alike)
    return ModelShape(config, tuple(kinds), tuple(kind_of_layer), _ends(model, weights))


def _ends(model: StagedModel, weights: dict[str, Weight]) -> dict[tuple[bool, bool], EndShape]:
    def groups(names: Iterable[str]) -> Iterable[EndGroup]:
        for name in names:
            own = [weight for key, weight in weights.items() if key.startswith(f"{name}.")]
            yield EndGroup(tuple(own), isinstance(getattr(model, name), ImageCondition))

    ends = {}
    for first in (False, True):
        for last in (False, True):
            names = (*(model.FIRST if first else ()), *(model.LAST if last else ()))
            norms = [weights["backbone.norm.weight"]] * last
            ends[first, last] = EndShape(tuple(groups(names)), tuple(norms), first, last)
    return ends


def _with_mixer(
    named: dict[str, tuple[int, ...]], mixer: OtherMixer
) -> Iterable[tuple[str, tuple[int, ...]]]:
    for name, shape in named.items():
        if ".mixer.q_proj." in name:
            for matrix, matrix_shape in mixer.matrices.items():
                yield name.replace("q_proj", matrix), tuple(matrix_shape)
        elif ".mixer." not in name:
            yield name, shape


def _weight(name: str, shape: tuple[int, ...], is_muon: bool) -> Weight:
    module = name.split(".")[-2]
    is_shared = ".ffn.shared." in name
    group: Group = "matrices"
    if not name.startswith("backbone."):
        group = "ends"
    elif ".experts." in name:
        group = "experts"
    elif module in ("router", "rates", "skip", "adaln") or module.endswith("norm"):
        group = "exact"
    tp_dim = None
    if module in CUT_INTO_WORDS or (group != "experts" and module in CUT_BY_ROWS and not is_shared):
        tp_dim = 0
    elif group == "matrices" and module in CUT_BY_COLUMNS and not is_shared:
        tp_dim = 1
    return Weight(name, shape, group, tp_dim, is_muon)
