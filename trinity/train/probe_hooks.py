"""What is measured inside a forward pass: hooks that exist only while a sampled step runs.

Hooks add up on the device and never wait for it. In a replay for recomputation they do nothing, so
every pass counts once. Their products write into buffers of their own, which selective recompute
neither keeps nor counts (:func:`trinity.ops.common.scratch_bmm`).

Compiled blocks are left alone: a hook inside one would either not be called or become part of the
graph for good, as the compiler guards no hooks. Of a compiled model only the head is measured.

A model of images has no vocabulary, so nothing is measured at its head. What rows of images are
filled up with counts for nothing, except that experts are asked for the first rows that they get,
whatever these are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trinity.core.batch import IGNORED_TARGET
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.model_config import PRESETS
from trinity.nn.attention import GatedAttention
from trinity.nn.block import Block
from trinity.nn.head import VocabularyHead
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.moe import MoE
from trinity.nn.router import Routing
from trinity.ops.common import exact_dtypes, scratch_bmm
from trinity.ops.elementwise import swiglu
from trinity.parallel.model import ParallelModel
from trinity.train.probe_attention import AttentionProbe, is_replay, stride_for

EXPERT_ROWS = 8
"""Rows of each expert whose outputs are formed again, in each microbatch."""
HEAD_TOKENS = 256
"""Tokens of a microbatch whose logits are formed again."""
BUCKETS = 3
"""Place of the ranges of noise levels among what a mixture of experts of images is given."""


class ForwardProbes:
    """Sums and maxima over all microbatches of a step on this rank; fp64 on the model's device.

    L layers with experts, E experts, A layers with attention, of the whole model: what other ranks
    hold stays 0 in sums and -inf in maxima.
    """

    def __init__(self, model: ParallelModel) -> None:
        self.model = model
        self.attention_layers = attention_layers(model)
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        shape, device = self.model.config.model, self.model.device

        def filled(value: float, *sizes: int) -> Tensor:
            return torch.full(sizes, value, dtype=torch.float64, device=device)

        num_layers = len(shape.moe_layers)
        self.sums = {
            "router_square": filled(0, num_layers),
            "router_count": filled(0, num_layers),
            "output_norm": filled(0, num_layers, shape.num_experts),
            "output_rows": filled(0, num_layers, shape.num_experts),
        }
        self.maxima = {"attention_logit": filled(-torch.inf, len(self.attention_layers))}
        if not shape.is_image:
            self.sums |= {"logit_sum": filled(0, 1), "logit_count": filled(0, 1)}
            self.maxima["logit_max"] = filled(-torch.inf, 1)
        self._counts_BS: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Measure the passes inside the ``with`` block."""
        with contextlib.ExitStack() as stack:
            for stage in self.model.stages:
                for end in stage.model.ends():
                    if isinstance(end, VocabularyHead):
                        stack.enter_context(end.register_forward_pre_hook(self._head))
                if self.model.config.train.compile:
                    continue
                for name, block in stage.model.backbone.layers.items():
                    self._enter_block(stack, int(name), block)
            yield

    def _enter_block(self, stack: contextlib.ExitStack, layer: int, block: nn.Module) -> None:
        assert isinstance(block, Block)
        if isinstance(block.ffn, MoE):
            row = self.model.config.model.moe_layers.index(layer)
            hook = partial(self._arrive, row)
            stack.enter_context(block.ffn.register_forward_pre_hook(hook))
            hook = partial(self._router, row)
            stack.enter_context(block.ffn.router.register_forward_hook(hook))
            # After FSDP2's own hook, which has gathered the weights.
            hook = partial(self._experts, row)
            stack.enter_context(block.ffn.experts.register_forward_pre_hook(hook))
        if layer in self.attention_layers:
            assert isinstance(block.mixer, GatedAttention | LinearMixer)
            slot = self.maxima["attention_logit"][self.attention_layers.index(layer)]
            config = self.model.config
            num_images = config.images_per_row if isinstance(config, ImageRunConfig) else None
            probe = AttentionProbe(block.mixer, slot, self.model.layout.cp, num_images)
            stack.enter_context(probe.installed())

    def _arrive(self, row: int, _moe: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Which tokens count: of images, those in a range of noise levels."""
        if len(args) > 1 and not is_replay():
            self._counts_BS[row] = args[BUCKETS] >= 0

    @torch.no_grad()
    def _router(self, row: int, _router: nn.Module, _args: Any, routing: Routing) -> None:
        """Squares of the logits, found from the scores.

        A score that has reached 1 or 0 is taken for its last neighbour: logits of fp32 scores count
        as 16.6 at most and as -87 at least.
        """
        if is_replay():
            return
        scores_TE = routing.scores_TE.detach()
        with exact_dtypes(scores_TE):
            limits = torch.finfo(scores_TE.dtype)
            logits_TE = torch.logit(scores_TE.clamp(limits.tiny, 1 - limits.eps / 2))
            squares_T = logits_TE.square_().sum(1, dtype=torch.float64)
        counts_BS = self._counts_BS.pop(row, squares_T.new_ones(1, 1, dtype=torch.bool))
        squares_BS = squares_T.view(len(counts_BS), -1)
        self.sums["router_square"][row] += squares_BS.where(counts_BS, 0.0).sum()
        num_tokens = counts_BS.expand_as(squares_BS).sum()
        self.sums["router_count"][row] += num_tokens * scores_TE.shape[1]

    @torch.no_grad()
    def _experts(self, row: int, experts: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        """Norms of the unweighted outputs of the first rows that each expert here got."""
        x_TD, index_TK, _ = args
        if is_replay() or index_TK.numel() == 0:
            return
        gate_up_E2FD, down_EDF = experts.gate_up.detach(), experts.down.detach()
        num_here = len(gate_up_E2FD)
        row_Er, is_there_Er = first_rows(index_TK, num_here, EXPERT_ROWS)
        with exact_dtypes(x_TD):
            x_ErD = x_TD.detach()[row_Er].to(gate_up_E2FD.dtype)
            hidden = scratch_bmm(x_ErD, gate_up_E2FD.flatten(1, 2).mT)
            out_ErD = scratch_bmm(swiglu(*hidden.chunk(2, dim=-1)), down_EDF.mT)
            norm_Er = torch.linalg.vector_norm(out_ErD, dim=-1, dtype=_wide(out_ErD)).double()
        meshes = self.model.meshes
        first = meshes.at.ep * num_here if meshes is not None else 0
        mine = slice(first, first + num_here)
        self.sums["output_norm"][row, mine] += norm_Er.where(is_there_Er, 0.0).sum(1)
        self.sums["output_rows"][row, mine] += is_there_Er.sum(1)

    @torch.no_grad()
    def _head(self, head: nn.Module, args: tuple[Tensor, Tensor | None]) -> None:
        """Logits of some tokens again; of the words that are here, where ranks share them."""
        assert isinstance(head, VocabularyHead)
        x_TD, target_T = args[0].detach(), args[1]
        if target_T is None:
            return
        stride = stride_for(len(x_TD) * self.model.layout.cp, HEAD_TOKENS)
        is_valid_N = target_T[::stride] != IGNORED_TARGET
        weight_VD = head.weight.detach()
        with exact_dtypes(x_TD):
            logits_NV = torch.mm(x_TD[::stride].to(weight_VD.dtype), weight_VD.mT)
            highest_N = logits_NV.amax(1).double()
            sum_N = logits_NV.sum(1, dtype=torch.float64)
        self.sums["logit_sum"] += sum_N.where(is_valid_N, 0.0).sum()
        self.sums["logit_count"] += is_valid_N.sum() * weight_VD.shape[0]
        highest = highest_N.where(is_valid_N, -torch.inf).amax()
        self.maxima["logit_max"].copy_(torch.maximum(self.maxima["logit_max"], highest))


def attention_layers(model: ParallelModel) -> list[int]:
    """Layers of the whole model whose weights are a softmax: attention, and 2Mamba-E's."""
    config = model.config.model
    kinds = {"sliding_attention", "full_attention"} | {
        kind
        for kind in set(config.layer_types)
        if kind in PRESETS and config.linear.options(kind).power == "exp"
    }
    return [layer for layer, kind in enumerate(config.layer_types) if kind in kinds]


def first_rows(index_TK: Tensor, num_experts: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens of the first ``count`` pairs of each expert, and which of these exist; (E, count).

    Nothing travels to the host. What does not exist is a token all the same, but a wrong one.
    """
    expert_R = index_TK.flatten()
    order_R = torch.argsort(expert_R, stable=True)
    ones_R = torch.ones_like(expert_R)
    count_E = expert_R.new_zeros(num_experts).scatter_add_(0, expert_R, ones_R)
    first_E = count_E.cumsum(0) - count_E
    number_r = torch.arange(count, device=expert_R.device)
    place_Er = (first_E.unsqueeze(1) + number_r).clamp_(max=len(order_R) - 1)
    return order_R[place_Er] // index_TK.shape[1], number_r < count_E.unsqueeze(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
