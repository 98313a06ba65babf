"""The first-order scan in chunks (SSD, arXiv 2405.21060, section 6), as one autograd node.

Inside a chunk every weight is formed; between chunks a state of d x e numbers per head is carried.
What makes it fast on a CPU: q k^T is formed once for all heads that share q and k, heads are folded
into columns so that products with states are few and large, and a long row is worked off in spans
of chunks whose weights fit the cache. States are carried in fp32.

Letters beside those of :mod:`trinity.core.shapes`: ``n`` chunks, ``c`` tokens of a chunk, ``r``
query heads per state, ``m`` states per key head (r or m is 1), ``N`` = B * n * G matrices, ``x`` =
m * e columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity.ops.common import exact_dtypes, scratch_bmm
from trinity.ops.scan_inputs import Heads, ScanInputs, heads_of, runs_of

CHUNK_TOKENS = 64
"""Of 32, 64, 128 and 256, the fastest on a CPU from 512 to 8192 tokens (tools/bench/scan.py)."""
SPAN_WEIGHTS = 2**18
"""Weights formed at a time on a CPU: 1 MiB in fp32, a core's share of the cache."""


def chunked_scan(inputs: ScanInputs, chunk_tokens: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """Output (B, S, H or U, e) and final state (B, U, d, e); see :func:`trinity.ops.scan.scan`."""
    assert inputs.power == 1
    assert not inputs.normalize
    run_BS = None if inputs.document_ids is None else runs_of(inputs.document_ids)
    return _ChunkedScan.apply(
        inputs.q * inputs.scale,
        inputs.k,
        inputs.v,
        inputs.log_decay,
        inputs.initial_state,
        run_BS,
        chunk_tokens,
    )


def first_order_final_state(inputs: ScanInputs) -> Tensor:
    """The final state alone, without an initial one; (B, U, d, e)."""
    heads = heads_of(inputs.k, inputs.k, inputs.v, inputs.log_decay)
    left_BSU = end_decays(inputs.log_decay, inputs.document_ids)
    wide = left_BSU.dtype
    v_BGSme = (inputs.v.to(wide) * left_BSU.unsqueeze(-1)).unflatten(2, (heads.groups, -1))
    v_BGSx = v_BGSme.transpose(1, 2).flatten(3)
    state_BGdx = inputs.k.to(wide).permute(0, 2, 3, 1) @ v_BGSx
    return state_BGdx.unflatten(3, (heads.values_per_key, -1)).transpose(2, 3).flatten(1, 2)


def end_decays(log_decay_BSU: Tensor, document_ids_BS: Tensor | None) -> Tensor:
    """How much of each token is left after the last one; 0 outside the last document."""
    after_BSU = log_decay_BSU.flip(1).cumsum(1).flip(1) - log_decay_BSU
    left_BSU = after_BSU.exp()
    if document_ids_BS is not None:
        run_BS = runs_of(document_ids_BS)
        left_BSU = left_BSU * (run_BS == run_BS[:, -1:]).unsqueeze(-1)
    return left_BSU


class _Cut:
    """Spans of rows cut into chunks, and heads into groups: the layouts of one span."""

    def __init__(self, batch: int, num_tokens: int, heads: Heads, chunk_tokens: int) -> None:
        self.batch, self.num_tokens, self.heads = batch, num_tokens, heads
        self.chunk_tokens = min(chunk_tokens, num_tokens)
        self.num_chunks = -(-num_tokens // self.chunk_tokens)
        self.padding = self.num_chunks * self.chunk_tokens - num_tokens

    def fold(self, x_BSHd: Tensor, *, queries: int = 1, values: int = 1) -> Tensor:
        """(B, S, G r m, d) -> (N, r c, m d). Tokens that fill up the last chunk are zeros."""
        if self.padding:
            x_BSHd = F.pad(x_BSHd, (0, 0, 0, 0, 0, self.padding))
        x = x_BSHd.unflatten(2, (self.heads.groups, queries, values))
        x = x.unflatten(1, (self.num_chunks, -1)).permute(0, 1, 3, 4, 2, 5, 6)
        return x.reshape(-1, queries * self.chunk_tokens, values * x_BSHd.shape[3])

    def unfold(self, x_Nrx: Tensor, *, queries: int = 1, values: int = 1) -> Tensor:
        """The inverse."""
        x = x_Nrx.unflatten(2, (values, -1)).unflatten(1, (queries, -1))
        x = x.unflatten(0, (self.batch, self.num_chunks, -1)).permute(0, 1, 4, 2, 3, 5, 6)
        return x.flatten(3, 5).flatten(1, 2)[:, : self.num_tokens]

    def per_head(self, x_Nrx: Tensor) -> Tensor:
        """(N, r c, m e) -> (N m, r c, e)."""
        m = self.heads.values_per_key
        return x_Nrx if m == 1 else x_Nrx.unflatten(2, (m, -1)).transpose(1, 2).flatten(0, 1)

    def columns(self, x_Mre: Tensor) -> Tensor:
        """(N m, r c, e) -> (N, r c, m, e), a view."""
        return x_Mre.unflatten(0, (-1, self.heads.values_per_key)).transpose(1, 2)

    def scaled(self, x_Nrx: Tensor, factor_Nmc: Tensor) -> Tensor:
        """(N, r c, m e) with each token of each head times its factor."""
        m = self.heads.values_per_key
        x = x_Nrx.unflatten(2, (m, -1)).unflatten(1, (-1, self.chunk_tokens))
        return (x * factor_Nmc.mT[:, None, :, :, None]).view(x_Nrx.shape)

    def sums(self, x_Nrx: Tensor) -> Tensor:
        """Over what each token of each head holds: (N, r c, m e) -> (N, m, c)."""
        m = self.heads.values_per_key
        x = x_Nrx.unflatten(2, (m, -1)).unflatten(1, (-1, self.chunk_tokens))
        return x.sum((1, 4)).mT

    def chunk_states(self, state_BUde: Tensor) -> Tensor:
        """(B, U, d, e) -> (B, G, d, m, e): heads beside each other."""
        return state_BUde.unflatten(1, (self.heads.groups, -1)).transpose(2, 3)

    def joined_states(self, state_BGdme: Tensor) -> Tensor:
        """The inverse."""
        return state_BGdme.transpose(2, 3).flatten(1, 2)

    def by_chunk(self, x_Ndx: Tensor) -> Tensor:
        """(N, d, m e) -> (B, n, G, d, m, e), a view."""
        x = x_Ndx.unflatten(0, (self.batch, self.num_chunks, -1))
        return x.unflatten(-1, (self.heads.values_per_key, -1))


class _Decays(NamedTuple):
    """What the log decays of a chunk come to, fp32."""

    inside: Tensor
    """exp(sum over j + 1 .. i), 0 where token i does not see token j: (N, m, c, c)"""
    inflow: Tensor
    """What is left, at token i, of the state before the chunk: (N, m, c)"""
    outflow: Tensor
    """What is left, after the chunk, of token j: (N, m, c)"""
    whole: Tensor
    """What is left, after the chunk, of the state before it: (B, n, G, 1, m, 1)"""


def _decays(log_decay_BSU: Tensor, run_BS: Tensor | None, cut: _Cut) -> _Decays:
    """Sums start anew in each chunk: one sum over a long row would lose the small differences."""
    rates_Ncm = cut.fold(log_decay_BSU.unsqueeze(-1), values=cut.heads.values_per_key)
    sums_Nmc = rates_Ncm.mT.contiguous().cumsum(-1)
    hidden_cc = torch.full((cut.chunk_tokens, cut.chunk_tokens), float("-inf")).triu_(1)
    # Masked before exp: above the diagonal it overflows.
    inside_Nmcc = sums_Nmc.unsqueeze(-1) - sums_Nmc.unsqueeze(-2)
    inside_Nmcc.add_(hidden_cc.to(inside_Nmcc))
    inflow_Nmc, last_Nm1 = sums_Nmc.exp(), sums_Nmc[..., -1:]
    outflow_Nmc, whole_Nm = (last_Nm1 - sums_Nmc).exp_(), last_Nm1.squeeze(-1).exp()
    if run_BS is not None:
        run_Bnc = F.pad(run_BS.double(), (0, cut.padding), mode="replicate")
        run_Bnc = run_Bnc.unflatten(1, (cut.num_chunks, -1))
        last_Bn1 = run_Bnc[..., -1:]
        before_Bn1 = F.pad(last_Bn1, (0, 0, 1, 0))[:, :-1]  # 0 is the document before the span

        def over_groups(flags: Tensor) -> Tensor:
            return (
                flags.unsqueeze(2).expand(-1, -1, cut.heads.groups, *flags.shape[2:]).flatten(0, 2)
            )

        foreign_Ncc = over_groups(run_Bnc.unsqueeze(-1) != run_Bnc.unsqueeze(-2))
        inside_Nmcc.masked_fill_(foreign_Ncc.unsqueeze(1), float("-inf"))
        inflow_Nmc = inflow_Nmc * over_groups(run_Bnc == before_Bn1).unsqueeze(1)
        outflow_Nmc = outflow_Nmc * over_groups(run_Bnc == last_Bn1).unsqueeze(1)
        whole_Nm = whole_Nm * over_groups(last_Bn1 == before_Bn1)
    whole = cut.by_chunk(whole_Nm.unsqueeze(1))
    return _Decays(inside_Nmcc.exp_(), inflow_Nmc, outflow_Nmc, whole)


class _ChunkedScan(torch.autograd.Function):
    """Saves the inputs and the states before the chunks; weights are formed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSUe: Tensor,
        log_decay_BSU: Tensor,
        initial_state: Tensor | None,
        run_BS: Tensor | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        rows = (q_BSHd, k_BSGd, v_BSUe, log_decay_BSU)
        ctx.heads, ctx.chunk_tokens = heads_of(*rows), chunk_tokens
        batch, num_tokens, num_states, width = v_BSUe.shape
        if initial_state is None:
            state = log_decay_BSU.new_zeros(batch, num_states, k_BSGd.shape[3], width)
        else:
            state = initial_state.to(log_decay_BSU.dtype)
        out_BSHe = v_BSUe.new_empty(batch, num_tokens, max(q_BSHd.shape[2], num_states), width)
        befores: list[Tensor] = []
        for span in _spans(v_BSUe, chunk_tokens):
            part = _Span(ctx.heads, chunk_tokens, rows, run_BS, span)
            out_BSHe[:, span], state, before_Ndx = part.forward(state)
            befores.append(before_Ndx)
        ctx.save_for_backward(*rows, run_BS, *befores)
        return out_BSHe, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: recompute unpacks them
        rows, (run_BS, *befores) = saved[:4], saved[4:]
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in rows]
        with exact_dtypes(grad_out):
            for span in reversed(_spans(rows[2], ctx.chunk_tokens)):
                part = _Span(ctx.heads, ctx.chunk_tokens, rows, run_BS, span)
                of_span, grad_state = part.backward(befores.pop(), grad_out[:, span], grad_state)
                for grad, grad_of_span in zip(grads, of_span, strict=True):
                    grad[:, span] = grad_of_span
        return *grads, grad_state if ctx.needs_input_grad[4] else None, None, None


def _spans(v_BSUe: Tensor, chunk_tokens: int) -> list[slice]:
    """Whole chunks that are worked on at once; all of them on a GPU.

    On a CPU a row at once takes 1.6 times as long at 8192 tokens, much of it to be given memory.
    """
    batch, num_tokens, num_states, _ = v_BSUe.shape
    length = num_tokens
    if v_BSUe.device.type == "cpu":
        chunks = SPAN_WEIGHTS // (batch * num_states * chunk_tokens**2)
        length = max(1, chunks) * chunk_tokens
    return [slice(t, min(t + length, num_tokens)) for t in range(0, num_tokens, length)]


class _Span:
    """Some chunks of all rows, in the layouts of the products."""

    def __init__(
        self,
        heads: Heads,
        chunk_tokens: int,
        rows: tuple[Tensor, Tensor, Tensor, Tensor],
        run_BS: Tensor | None,
        span: slice,
    ) -> None:
        q_BSHd, k_BSGd, v_BSUe, log_decay_BSU = (x[:, span] for x in rows)
        if run_BS is not None:
            # 0 is the document of the token before the span, as it is at the start of a row.
            first_B1 = run_BS[:, max(span.start - 1, 0) : max(span.start, 1)]
            run_BS = run_BS[:, span] - first_B1
        self.cut = cut = _Cut(q_BSHd.shape[0], q_BSHd.shape[1], heads, chunk_tokens)
        self.wide = log_decay_BSU.dtype
        self.decays = _decays(log_decay_BSU, run_BS, cut)
        self.q_Nrd = cut.fold(q_BSHd, queries=heads.queries_per_key)
        self.k_Ncd, self.v_Ncx = cut.fold(k_BSGd), cut.fold(v_BSUe, values=heads.values_per_key)
        self.out_heads = {"queries": heads.queries_per_key, "values": heads.values_per_key}

    def weights(self) -> tuple[Tensor, Tensor]:
        """q k^T (N, r c, c), and the weights of tokens for those they see (N m, r c, c)."""
        inside_Nmcc = self.decays.inside
        num, _, chunk, _ = inside_Nmcc.shape
        scores_Nrc = scratch_bmm(self.q_Nrd, self.k_Ncd.mT)
        # Either r or m is 1, so that it does not matter which of them comes first.
        weights = scores_Nrc.view(num, -1, 1, chunk, chunk) * inside_Nmcc.unsqueeze(1)
        weights = weights.to(self.v_Ncx.dtype)
        return scores_Nrc, weights.view(num * inside_Nmcc.shape[1], -1, chunk)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (B, S, H or U, e), the state after the span, and those before its chunks."""
        cut, decays, wide = self.cut, self.decays, self.wide
        left_Ncx = cut.scaled(self.v_Ncx, decays.outflow)
        grown_Ndx = scratch_bmm(self.k_Ncd.to(wide).mT, left_Ncx)
        before_Ndx, state = _carry(grown_Ndx, decays.whole, state, cut)
        out_Nrx = cut.scaled(scratch_bmm(self.q_Nrd.to(wide), before_Ndx), decays.inflow)
        _, weights = self.weights()
        inside = cut.columns(scratch_bmm(weights, cut.per_head(self.v_Ncx)))
        out_Nrx.view(inside.shape).add_(inside)
        return cut.unfold(out_Nrx, **self.out_heads), state, before_Ndx

    def backward(
        self, before_Ndx: Tensor, grad_out: Tensor, grad_after: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Gradients of q, k, v and the log decays; and of the state before the span."""
        cut, decays = self.cut, self.decays
        q_wide, k_wide = self.q_Nrd.to(self.wide), self.k_Ncd.to(self.wide)
        grad_Nrx = cut.fold(grad_out, **self.out_heads)

        # Between chunks, in the wide dtype.
        reaching_Nrx = cut.scaled(grad_Nrx, decays.inflow)
        grad_q_Nrd = torch.bmm(reaching_Nrx, before_Ndx.mT)
        grad_grown_Ndx, grad_before = _carry_back(
            torch.bmm(q_wide.mT, reaching_Nrx), decays.whole, grad_after, cut
        )
        passed = cut.by_chunk(grad_grown_Ndx * before_Ndx).sum((3, 5), keepdim=True)
        passed_Nm1 = (passed * decays.whole).view(len(q_wide), -1, 1)
        if cut.heads.values_per_key == 1:
            inflow_Nmc = cut.sums(q_wide * grad_q_Nrd)
        else:
            inflow_Nmc = cut.sums(torch.bmm(q_wide, before_Ndx).mul_(reaching_Nrx))
        left_Ncx = cut.scaled(self.v_Ncx, decays.outflow)
        grad_left_Ncx = torch.bmm(k_wide, grad_grown_Ndx)
        grad_k_Ncd = torch.bmm(left_Ncx, grad_grown_Ndx.mT)
        outflow_Nmc = cut.sums(left_Ncx.mul_(grad_left_Ncx))
        grad_v_Ncx = cut.scaled(grad_left_Ncx, decays.outflow)

        # Inside chunks.
        scores_Nrc, weights = self.weights()
        grad_heads = cut.per_head(grad_Nrx)
        grad_v = cut.columns(torch.bmm(weights.mT, grad_heads))
        grad_v_Ncx.view(grad_v.shape).add_(grad_v)
        grad_weights = torch.bmm(grad_heads, cut.per_head(self.v_Ncx).mT)
        num, num_states, chunk, _ = decays.inside.shape
        grad_scores = grad_weights.view(num, -1, num_states, chunk, chunk)
        grad_scores = grad_scores * decays.inside.unsqueeze(1)
        exponents = grad_scores * scores_Nrc.view(num, -1, 1, chunk, chunk)
        exponents_Nmc = (exponents.sum(-1) - exponents.sum(-2)).sum(1)
        grad_scores = grad_scores.sum(2).flatten(1, 2).to(self.k_Ncd.dtype)
        grad_q_Nrd.add_(torch.bmm(grad_scores, self.k_Ncd))
        grad_k_Ncd.add_(torch.bmm(grad_scores.mT, self.q_Nrd))

        # The exponents: token i's own sum raises what it sees, lowers what is seen of it.
        grad_sums = inflow_Nmc - outflow_Nmc + exponents_Nmc
        grad_sums[..., -1:] += outflow_Nmc.sum(-1, keepdim=True) + passed_Nm1
        grad_decay_Ncm = grad_sums.flip(-1).cumsum(-1).flip(-1).mT
        grads = (
            cut.unfold(grad_q_Nrd, queries=cut.heads.queries_per_key),
            cut.unfold(grad_k_Ncd),
            cut.unfold(grad_v_Ncx, values=cut.heads.values_per_key),
            cut.unfold(grad_decay_Ncm, values=cut.heads.values_per_key).squeeze(-1),
        )
        return grads, grad_before


def _carry(grown_Ndx: Tensor, whole: Tensor, state: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (N, d, m e), and the last one, (B, U, d, e)."""
    before_Ndx = torch.empty_like(grown_Ndx)
    before, grown = cut.by_chunk(before_Ndx).unbind(1), cut.by_chunk(grown_Ndx).unbind(1)
    decays = whole.unbind(1)
    before[0].copy_(cut.chunk_states(state))
    for i in range(len(grown) - 1):
        torch.addcmul(grown[i], decays[i], before[i], out=before[i + 1])
    last = torch.addcmul(grown[-1], decays[-1], before[-1])
    return before_Ndx, cut.joined_states(last)


def _carry_back(
    grad_before_Ndx: Tensor, whole: Tensor, grad_state: Tensor, cut: _Cut
) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk grew, (N, d, m e), and of the state before, (B, U, d, e)."""
    grad_grown_Ndx = torch.empty_like(grad_before_Ndx)
    grown = cut.by_chunk(grad_grown_Ndx).unbind(1)
    before = cut.by_chunk(grad_before_Ndx).unbind(1)
    decays = whole.unbind(1)
    grown[-1].copy_(cut.chunk_states(grad_state))
    for i in range(len(grown) - 1, 0, -1):
        torch.addcmul(before[i], decays[i], grown[i], out=grown[i - 1])
    first = torch.addcmul(before[0], decays[0], grown[0])
    return grad_grown_Ndx, cut.joined_states(first)
