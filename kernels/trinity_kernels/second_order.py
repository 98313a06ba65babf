"""The second-order scan (2Mamba, power retention), with its gradient.

Kept for the backward: inputs, output, what rounding to 16 bits took from it, and one number per row
of weights. States of chunks are made again there: at d = 64 one weighs 0.6 MB per head, and making
them is a fifth of the backward.

With a single chunk and no initial state no state is read or made unless it is asked for, and what
remains is quadratic attention: the better choice for short rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity_kernels.decay import log_decay_gradient
from trinity_kernels.forgetting import row_dots
from trinity_kernels.layout import on_device_of
from trinity_kernels.second_order_launch import (
    OutputGradient,
    Rows,
    SecondOrderOptions,
    chunk_states,
    key_gradient,
    outputs,
    query_gradient,
    rows_of,
)
from trinity_kernels.triangle import (
    BlockedState,
    to_blocked,
    to_blocked_gradient,
    to_packed,
    to_packed_gradient,
)


class SecondOrderScan(torch.autograd.Function):
    """Inputs contiguous and checked; see ``trinity_kernels.second_order_scan``."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSVe: Tensor,
        log_decay_BSV: Tensor,
        initial_BVDe: Tensor | None,
        documents_BS: Tensor | None,
        options: SecondOrderOptions,
    ) -> tuple[Tensor, Tensor | None]:
        with on_device_of(q_BSHd):
            rows = rows_of(log_decay_BSV, documents_BS, options.chunk)
            reads_states = initial_BVDe is not None or rows.num_chunks > 1
            states = final = None
            if reads_states or options.want_final:
                states, last = _forward_states(
                    k_BSGd, v_BSVe, rows, initial_BVDe, options, keep_all=reads_states
                )
                if options.want_final:
                    final = to_packed(last, k_BSGd.shape[3], options.feature_block)
            results = outputs(
                (q_BSHd, k_BSGd, v_BSVe),
                rows,
                states,
                options,
                has_initial=initial_BVDe is not None,
            )
        ctx.save_for_backward(
            q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, initial_BVDe, documents_BS, *results
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        return results[0], final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out_BSHe: Tensor | None, grad_final_BVDe: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, initial_BVDe, documents_BS = ctx.saved_tensors[:6]
        out_BSHe, inverse_BHS, rest_BSHe = ctx.saved_tensors[6:]
        options: SecondOrderOptions = ctx.options
        if grad_out_BSHe is None:
            grad_out_BSHe = torch.zeros_like(out_BSHe)
        with on_device_of(q_BSHd):
            rows = rows_of(log_decay_BSV, documents_BS, options.chunk)
            grad = _output_gradient(
                grad_out_BSHe.contiguous(), out_BSHe, inverse_BHS, rest_BSHe, options
            )
            grads = _backward(
                (q_BSHd, k_BSGd, v_BSVe), grad, rows, initial_BVDe, grad_final_BVDe, options
            )
        return *grads, None, None


def _output_gradient(
    grad_out_BSHe: Tensor,
    out_BSHe: Tensor,
    inverse_BHS: Tensor,
    rest_BSHe: Tensor | None,
    options: SecondOrderOptions,
) -> OutputGradient:
    if not options.normalize:
        return OutputGradient(grad_out_BSHe, inverse_BHS, inverse_BHS)
    dot_BHS = row_dots(grad_out_BSHe, out_BSHe)
    if rest_BSHe is not None:
        dot_BHS += row_dots(grad_out_BSHe, rest_BSHe)
    return OutputGradient(grad_out_BSHe, inverse_BHS, -dot_BHS * inverse_BHS)


class SecondOrderFinalState(torch.autograd.Function):
    """The final state alone; ``options.chunk`` spans the row."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BSGd: Tensor,
        v_BSVe: Tensor,
        log_decay_BSV: Tensor,
        documents_BS: Tensor | None,
        options: SecondOrderOptions,
    ) -> Tensor:
        with on_device_of(k_BSGd):
            rows = rows_of(log_decay_BSV, documents_BS, options.chunk)
            _, final = _forward_states(k_BSGd, v_BSVe, rows, None, options, keep_all=False)
        ctx.save_for_backward(k_BSGd, v_BSVe, log_decay_BSV, documents_BS)
        ctx.options = options
        return to_packed(final, k_BSGd.shape[3], options.feature_block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_final_BVDe: Tensor) -> tuple[Tensor | None, ...]:
        k_BSGd, v_BSVe, log_decay_BSV, documents_BS = ctx.saved_tensors
        options: SecondOrderOptions = ctx.options
        with on_device_of(k_BSGd):
            rows = rows_of(log_decay_BSV, documents_BS, options.chunk)
            grad_state = _blocked_gradient(grad_final_BVDe, k_BSGd.shape[3], options)
            grad_k_BSGd, grad_v_BSVe, pairs_BVS, leaving_BVS = key_gradient(
                None, k_BSGd, v_BSVe, None, rows, grad_state, options
            )
        grad_decay_BSV = log_decay_gradient(pairs_BVS, leaving_BVS, None, options.chunk)
        return grad_k_BSGd, grad_v_BSVe, grad_decay_BSV, None, None


def _forward_states(
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    rows: Rows,
    initial_BVDe: Tensor | None,
    options: SecondOrderOptions,
    *,
    keep_all: bool,
) -> tuple[BlockedState | None, BlockedState]:
    boundary = None
    if initial_BVDe is not None:
        boundary = to_blocked(
            initial_BVDe, k_BSGd.shape[3], options.feature_block, normalize=options.normalize
        )
    return chunk_states(k_BSGd, v_BSVe, rows, boundary, options, keep_all=keep_all)


def _blocked_gradient(grad_final_BVDe: Tensor, d: int, options: SecondOrderOptions) -> BlockedState:
    return to_packed_gradient(
        grad_final_BVDe, d, options.feature_block, normalize=options.normalize
    )


def _backward(
    tokens: tuple[Tensor, Tensor, Tensor],
    grad: OutputGradient,
    rows: Rows,
    initial_BVDe: Tensor | None,
    grad_final_BVDe: Tensor | None,
    options: SecondOrderOptions,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, log decay and the initial state."""
    q_BSHd, k_BSGd, v_BSVe = tokens
    heads, d = options.heads, q_BSHd.shape[3]
    boundary = None if grad_final_BVDe is None else _blocked_gradient(grad_final_BVDe, d, options)
    states = grad_states = grad_initial_BVDe = through_BVN = None
    if initial_BVDe is not None or rows.num_chunks > 1:
        states, _ = _forward_states(k_BSGd, v_BSVe, rows, initial_BVDe, options, keep_all=True)
        grad_states, first = chunk_states(
            q_BSHd, grad.out, rows, boundary, options, keep_all=True, grad=grad
        )
        assert states is not None
        assert grad_states is not None
        through_BVN = rows.decays.through_BVN * _inner(states, grad_states)
        if initial_BVDe is not None:
            grad_initial_BVDe = to_blocked_gradient(first, d, options.feature_block)
    elif boundary is not None:
        grad_states = boundary
    has_initial = initial_BVDe is not None
    grad_q_BSHd, query_pairs_BHS = query_gradient(
        tokens, grad, rows, states, options, has_initial=has_initial
    )
    grad_k_BSGd, grad_v_BSVe, key_pairs_BVS, leaving_BVS = key_gradient(
        q_BSHd, k_BSGd, v_BSVe, grad, rows, grad_states, options
    )
    pairs_BVS = query_pairs_BHS.unflatten(1, (heads.num_states, -1)).sum(2) - key_pairs_BVS
    grad_decay_BSV = log_decay_gradient(pairs_BVS, leaving_BVS, through_BVN, options.chunk)
    return grad_q_BSHd, grad_k_BSGd, grad_v_BSVe, grad_decay_BSV, grad_initial_BVDe


def _inner(states: BlockedState, grads: BlockedState) -> Tensor:
    """<S_n, G_n> of every chunk, as batched products: no temporary of their size."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.flatten(3), b.flatten(3)
        return (a.unsqueeze(3) @ b.unsqueeze(4)).flatten(2)

    total = dot(states.values, grads.values)
    if states.sums is not None and grads.sums is not None:
        total = total + dot(states.sums, grads.sums)
    return total
