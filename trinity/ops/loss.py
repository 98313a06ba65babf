"""The vocabulary loss: last matrix product, softmax, cross-entropy, a few hundred rows at a time.

The logits of a microbatch are its largest tensor by far (T x V; V is 200k for the released
models). They are never whole here: each chunk's logits live in a buffer that the next chunk
overwrites, and the gradient is formed from them in the forward, where they are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.common import accumulate_dtype, compute_dtype, exact_dtypes, not_traced


class VocabLoss(NamedTuple):
    """Sums over the valid tokens of a microbatch; the caller divides by the step's token count."""

    total: Tensor
    """cross_entropy + z_loss * z, scalar; the only one that carries a gradient."""
    cross_entropy: Tensor
    """Sum of negative log-likelihoods, nats."""
    z: Tensor
    """Sum of squared logsumexps of the logits."""


class VocabularyShard(NamedTuple):
    """This process holds some rows of the head; the others are with its peers."""

    first_word: int
    """Vocabulary entry of the first row that is here."""
    gather: Callable[[Tensor], Tensor]
    """Stacks a tensor of every peer along a new first dim."""


@not_traced
def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    z_loss: float,
    chunk_rows: int,
    ignore_index: int = -100,
    shard: VocabularyShard | None = None,
) -> VocabLoss:
    """Cross-entropy of ``softmax(x @ weight^T)`` against ``target_T``, in sums.

    Products run in the dtype of ``x_TD`` (autocast's inside an autocast region); logits are rounded
    to it, as a model that returns them would, and everything after is fp32. ``weight_VD`` may be
    wider; its gradient is summed over the chunks in fp32 and has the weight's dtype. Rows whose
    target is ``ignore_index`` take no part at all: a NaN there does no harm.

    Args:
        x_TD: final hidden states (T, D).
        weight_VD: the head.
        target_T: next tokens, int64, in 0..V-1 or ``ignore_index``.
        z_loss: coefficient of the squared logsumexp (PaLM's z-loss).
        chunk_rows: rows whose logits exist at a time.
        ignore_index: target value of rows that do not count.
        shard: where ``weight_VD`` is only a part of the head. Every peer gets the whole loss; the
            gradient of ``x_TD`` is then this part's share, to be summed over the peers.
    """
    x_TD = x_TD.to(compute_dtype(x_TD))
    # Read here: inside a node's forward gradients are always off.
    recording = torch.is_grad_enabled()
    settings = _Settings(
        z_loss,
        chunk_rows,
        ignore_index,
        wants_x=recording and x_TD.requires_grad,
        wants_weight=recording and weight_VD.requires_grad,
        shard=shard,
    )
    with exact_dtypes(x_TD):
        return VocabLoss(*_LinearCrossEntropy.apply(x_TD, weight_VD, target_T, settings))


def linear_cross_entropy_reference(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    z_loss: float,
    ignore_index: int = -100,
) -> VocabLoss:
    """What ``linear_cross_entropy`` computes, with all logits at once."""
    valid_T = target_T != ignore_index
    logits_TV = F.linear(x_TD[valid_T], weight_VD.to(x_TD.dtype))
    logits_TV = logits_TV.to(accumulate_dtype(x_TD.dtype))
    lse_T = torch.logsumexp(logits_TV, dim=-1)
    picked_T = logits_TV.gather(1, target_T[valid_T].unsqueeze(1)).squeeze(1)
    cross_entropy, z = (lse_T - picked_T).sum(), lse_T.square().sum()
    return VocabLoss(cross_entropy + z_loss * z, cross_entropy.detach(), z.detach())


class _Settings(NamedTuple):
    z_loss: float
    chunk_rows: int
    ignore_index: int
    wants_x: bool
    wants_weight: bool
    shard: VocabularyShard | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Value and gradient of the sums in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_N = (target_T != settings.ignore_index).nonzero().squeeze(1)
        all_count = len(row_N) == len(target_T)
        x_ND = x_TD.contiguous() if all_count else x_TD.index_select(0, row_N)
        target_N = target_T if all_count else target_T.index_select(0, row_N)
        walk = _ChunkWalk(x_ND, weight_VD.to(x_TD.dtype), settings)
        for start in range(0, len(x_ND), settings.chunk_rows):
            rows = slice(start, start + settings.chunk_rows)
            walk.value(rows, x_ND[rows], target_N[rows])
            if settings.wants_x or settings.wants_weight:
                walk.gradient(rows, x_ND[rows], target_N[rows])
        grad_x, grad_weight = walk.grad_x, walk.grad_weight
        if grad_x is not None and not all_count:
            grad_x = torch.zeros_like(x_TD).index_copy_(0, row_N, grad_x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        ctx.save_for_backward(grad_x, grad_weight)
        cross_entropy, z = walk.cross_entropy_N.sum(), walk.lse_N.square().sum()
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + settings.z_loss * z, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # A 0-dim tensor does not widen the product: dtypes stay those of the inputs.
        grad_x = None if grad_x is None else grad_x * grad
        grad_weight = None if grad_weight is None else grad_weight * grad
        return grad_x, grad_weight, None, None


class _ChunkWalk:
    """Buffers that every chunk overwrites, and what the chunks add up to.

    Fresh memory for every chunk would cost most of the gain in page faults.

    With p = softmax(logits), lse their logsumexp and f = 1 + 2 * z_loss * lse, the gradient of the
    total by the logits is f * p - onehot. The factor f is moved onto rows of width D: it multiplies
    (p - onehot / f) @ W on one side and x on the other, so that z-loss costs no pass over V.
    """

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, settings: _Settings) -> None:
        dtype, wide = x_ND.dtype, accumulate_dtype(x_ND.dtype)
        num_rows, num_words = min(settings.chunk_rows, len(x_ND)), weight_VD.shape[0]
        self.z_loss = settings.z_loss
        self.shard = settings.shard
        self.weight_VD = weight_VD
        self.logits = x_ND.new_empty(num_rows, num_words)
        self.wide = (
            self.logits if wide == dtype else self.logits.new_empty(num_rows, num_words, dtype=wide)
        )
        self.lse_N = x_ND.new_empty(len(x_ND), dtype=wide)
        self.cross_entropy_N = torch.empty_like(self.lse_N)
        self.grad_x = torch.empty_like(x_ND) if settings.wants_x else None
        self.grad_weight = self.outer_VD = None
        if settings.wants_weight:
            self.grad_weight = torch.zeros_like(weight_VD, dtype=wide)
            self.outer_VD = None if wide == dtype else torch.empty_like(weight_VD)

    def value(self, rows: slice, x_CD: Tensor, target_C: Tensor) -> None:
        """Fill in this chunk's losses; leaves its probabilities in ``wide``."""
        num_rows = len(x_CD)
        logits, wide = self.logits[:num_rows], self.wide[:num_rows]
        torch.mm(x_CD, self.weight_VD.mT, out=logits)
        if wide.dtype != logits.dtype:
            wide.copy_(logits)
        highest_C = wide.amax(1)
        target_C, is_here_C = self._own_words(target_C)
        picked_C = wide.gather(1, target_C.unsqueeze(1)).squeeze(1)
        torch.softmax(wide, 1, out=wide)  # in place: the kernel has read a row before it writes it
        # The likeliest word has p = 1 / sum(exp(logit - highest)), which never underflows.
        lse_C = highest_C - wide.amax(1).log_()
        if self.shard is not None:
            own_C = lse_C
            every = self.shard.gather(torch.stack((own_C, picked_C * is_here_C)))
            lse_C, picked_C = every[:, 0].logsumexp(0), every[:, 1].sum(0)
            wide.mul_((own_C - lse_C).exp_().unsqueeze(1))
        self.lse_N[rows] = lse_C
        torch.sub(lse_C, picked_C, out=self.cross_entropy_N[rows])

    def _own_words(self, target_C: Tensor) -> tuple[Tensor, Tensor | bool]:
        """Targets as rows of the weights that are here, and which of them really are."""
        if self.shard is None:
            return target_C, True
        own_C = target_C - self.shard.first_word
        is_here_C = (own_C >= 0) & (own_C < self.weight_VD.shape[0])
        return own_C.where(is_here_C, 0), is_here_C

    def gradient(self, rows: slice, x_CD: Tensor, target_C: Tensor) -> None:
        """Turn the probabilities in ``wide`` into this chunk's share of the gradients."""
        num_rows = len(x_CD)
        p_CV, low_CV = self.wide[:num_rows], self.logits[:num_rows]
        factor_C1 = (self.lse_N[rows] * (2.0 * self.z_loss)).add_(1.0).unsqueeze(1)
        factor_C1.masked_fill_(factor_C1 == 0, torch.finfo(factor_C1.dtype).tiny)
        target_C, is_here_C = self._own_words(target_C)
        minus_C1 = factor_C1.reciprocal().neg_()
        if self.shard is not None:
            minus_C1 *= torch.as_tensor(is_here_C).unsqueeze(1)
        p_CV.scatter_add_(1, target_C.unsqueeze(1), minus_C1)
        if low_CV.dtype != p_CV.dtype:
            low_CV.copy_(p_CV)
        if self.grad_x is not None:
            torch.mm(low_CV, self.weight_VD, out=self.grad_x[rows])
            if self.z_loss:
                self.grad_x[rows].mul_(factor_C1)
        if self.grad_weight is not None:
            scaled_CD = (x_CD * factor_C1).to(x_CD.dtype) if self.z_loss else x_CD
            if self.outer_VD is None:
                self.grad_weight.addmm_(low_CV.mT, scaled_CD)
            else:
                self.grad_weight.add_(torch.mm(low_CV.mT, scaled_CD, out=self.outer_VD))
