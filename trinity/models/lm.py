"""The AFMoE language model: embedding, backbone, untied head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trinity.core.config import Config
from trinity.core.model_config import ModelConfig
from trinity.models.backbone import Backbone, BackboneOutput
from trinity.models.staged import LossSums, StagedModel
from trinity.nn.block import LayerCache
from trinity.nn.head import VocabularyHead


class LanguageModel(StagedModel):
    """A causal language model of the AFMoE family (Trinity Nano, Mini, Large).

    A pipeline stage lacks the parts of other stages: ``embed_tokens`` or ``lm_head`` is None there.
    """

    FIRST = ("embed_tokens",)
    LAST = ("lm_head",)
    loss_is_whole = True
    config: ModelConfig
    embed_tokens: nn.Embedding | None
    lm_head: VocabularyHead | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)

    def forward(self, tokens_BS: Tensor, document_ids_BS: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) for tokens (B, S), int64.

        With ``document_ids_BS`` (B, S, integers that change where a new document starts),
        attention stays inside each document.
        """
        assert self.lm_head is not None
        return self.lm_head(self.hidden(tokens_BS, document_ids_BS).hidden_BSD)

    def hidden(
        self,
        tokens_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        first_position: int = 0,
    ) -> BackboneOutput:
        """Everything up to the head: hidden states (B, S, D) and routing statistics."""
        return self.backbone(self.embed(tokens_BS), document_ids_BS, caches, first_position)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """What the first block is given, (B, S, D)."""
        assert self.embed_tokens is not None
        x_BSD = self.embed_tokens(tokens_BS)
        if self.config.mup_enabled:
            x_BSD = x_BSD * self.config.hidden_size**0.5
        if torch.is_autocast_enabled(x_BSD.device.type):
            # The embedding is not an autocast op: without this the stream would stay fp32.
            x_BSD = x_BSD.to(torch.get_autocast_dtype(x_BSD.device.type))
        return x_BSD

    def enter(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Embedded tokens."""
        return self.embed(x)

    def run_blocks(self, x_BSD: Tensor, given: Mapping[str, Tensor]) -> BackboneOutput:
        """The stream after the blocks that are here."""
        return self.backbone(x_BSD, given.get("document_ids_BS"))

    def objective(
        self, out: BackboneOutput, given: Mapping[str, Tensor], config: Config
    ) -> LossSums:
        """Cross-entropy and z loss."""
        return self.loss_sums(
            out,
            given["targets_BS"],
            z_loss=config.loss.z_loss,
            chunk_rows=config.loss.chunk_rows,
        )

    def loss(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        chunk_rows: int = 256,
    ) -> LossSums:
        """Loss sums of a microbatch, never forming all logits; targets of -100 do not count."""
        out = self.hidden(tokens_BS, document_ids_BS)
        return self.loss_sums(out, targets_BS, z_loss=z_loss, chunk_rows=chunk_rows)

    def loss_sums(
        self, out: BackboneOutput, targets_BS: Tensor, *, z_loss: float, chunk_rows: int
    ) -> LossSums:
        """The head and the loss, given what the backbone returned."""
        assert self.lm_head is not None
        vocab = self.lm_head(
            out.hidden_BSD.flatten(0, 1),
            targets_BS.flatten(),
            z_loss=z_loss,
            chunk_rows=chunk_rows,
        )
        return LossSums(vocab.total, vocab.cross_entropy, vocab.z, out.balance_loss, out.load_LE)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters, total and active per token, counted on meta tensors.

    The balancing bias counts as a parameter, as in the released checkpoints. ``active`` leaves out
    the experts a token does not visit and the input embedding, which is a look-up.
    """
    model = LanguageModel.on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    biases = sum(moe.router.expert_bias.numel() for moe in model.moe_layers())
    assert model.embed_tokens is not None
    assert model.lm_head is not None
    embedding = model.embed_tokens.weight.numel()
    idle = 0
    for moe in model.moe_layers():
        experts = sum(p.numel() for p in moe.experts.parameters())
        idle += experts - experts * config.num_experts_per_tok // config.num_experts
    return {
        "total": total + biases,
        "active": total + biases - idle - embedding,
        "embedding": embedding,
        "head": model.lm_head.weight.numel(),
        "routed_experts": sum(
            p.numel() for moe in model.moe_layers() for p in moe.experts.parameters()
        ),
    }
