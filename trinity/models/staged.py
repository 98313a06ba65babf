"""What the language model and the diffusion transformer share: a backbone between two ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from trinity.core.model_config import BackboneConfig
from trinity.models.backbone import Backbone, BackboneOutput
from trinity.nn.init import initialize
from trinity.nn.moe import MoE


class LossSums(NamedTuple):
    """Sums over one microbatch, to be divided by the counts of the whole step."""

    total: Tensor
    """All that is divided by the number of what is counted; carries the gradient."""
    error: Tensor
    """What ``loss`` is the mean of, detached: negative log-likelihood of the valid tokens in nats,
    or squared error of the velocity, a mean over each image's elements."""
    z: Tensor
    """Summed squared logsumexp of the valid tokens, detached; 0 for images."""
    balance_loss: Tensor
    """Sequence-wise balance loss summed over rows and layers; carries a gradient."""
    load_LE: Tensor
    """Tokens per expert of every layer with experts, int64; see :class:`BackboneOutput`."""


class StagedModel(nn.Module):
    """A model that a pipeline can cut between any two blocks of its backbone.

    The first stage turns the first field of a batch into the stream (``enter``), every stage runs
    its blocks (``run_blocks``), the last forms the loss (``objective``). A stage lacks the parts of
    others: they are None.
    """

    FIRST: ClassVar[tuple[str, ...]]
    """Names of the modules that only the first stage has."""
    LAST: ClassVar[tuple[str, ...]]
    """Names of those that only the last stage has, besides the backbone's norm."""
    loss_is_whole: ClassVar[bool]
    """Whether each of the ranks that share matrices forms the whole loss, as those do that share
    out a vocabulary, or that of its own positions."""

    config: BackboneConfig
    backbone: Backbone

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def on_meta(cls, config: Any) -> Self:
        """The model's shapes without its memory, for counting and planning."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def initialized(cls, config: Any, *, seed: int) -> Self:
        """A model with the initial weights that ``seed`` determines, on the CPU in fp32."""
        model = cls.on_meta(config).to_empty(device="cpu")
        model.initialize(seed)
        return model

    def initialize(self, seed: int) -> None:
        """Fill what is here of the model with the initial values that ``seed`` determines."""
        config = self.config
        initialize(
            self, weight_std=config.weight_std, num_layers=config.num_hidden_layers, seed=seed
        )

    @abstractmethod
    def enter(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The stream that the first block is given, (B, S, D), from the first field of a batch.

        ``given`` are the other fields, by name.
        """

    @abstractmethod
    def run_blocks(self, x_BSD: Tensor, given: Mapping[str, Tensor]) -> BackboneOutput:
        """The stream after the blocks that are here."""

    @abstractmethod
    def objective(self, out: BackboneOutput, given: Mapping[str, Tensor], config: Any) -> LossSums:
        """The loss, by a run's configuration, from what the last block returned."""

    def num_extra_positions(self, num_images: int) -> int:
        """Positions that travel through the stages with those of the tokens, per row."""
        del num_images
        return 0

    def moe_layers(self) -> Iterator[MoE]:
        """The layers with experts that are here, in the order of ``load_LE``."""
        for module in self.backbone.layers.values():
            if isinstance(module.ffn, MoE):
                yield module.ffn

    def ends(self) -> Iterator[nn.Module]:
        """The modules before and after the backbone that are here."""
        for name in (*self.FIRST, *self.LAST):
            module = getattr(self, name)
            if module is not None:
                yield module

    def drop_ends(self, *, first: bool, last: bool) -> None:
        """Remove what belongs to the first stage, or to the last."""
        for name in (*(self.FIRST if first else ()), *(self.LAST if last else ())):
            setattr(self, name, None)
        if last:
            self.backbone.norm = None
