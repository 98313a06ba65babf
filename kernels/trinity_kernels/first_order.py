"""The first-order scan (Mamba-2, Mamba-2S, gated linear attention), chunked, with its gradient.

Forward: one product per chunk makes what the chunk adds to the state, a walk over chunks turns that
into the state each chunk receives, and a last kernel reads it and adds the pairs inside the chunk.
Kept for the backward: the inputs. The states of all chunks are made again there: at d = e = 64 they
are a tenth of its products, and would weigh half as much as bf16 q, k, v and o together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity_kernels import first_order_triton as tiles
from trinity_kernels.decay import Decays, chunk_decays, log_decay_gradient
from trinity_kernels.layout import Heads, launch, num_tiles, on_device_of
from trinity_kernels.tuning import settings

STATES_PER_PROGRAM = 8
"""States that one backward program walks when they share a query and key head: their gradients
then need V / 8 heads of fp32 scratch instead of V, and still fill the device."""


class ScanOptions(NamedTuple):
    """What is not a tensor."""

    heads: Heads
    scale: float
    chunk: int
    precision: str


def _launch_options(width: int, device: torch.device) -> dict[str, int]:
    tuned = settings("first_order", width, device)
    return {"num_warps": tuned["num_warps"], "num_stages": tuned["num_stages"]}


def _chunk_states(
    x: Tensor,
    y: Tensor,
    weight_BVS: Tensor,
    decays: Decays,
    boundary_BVde: Tensor | None,
    *,
    heads: tuple[int, int],
    scale: float,
    options: ScanOptions,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """State every chunk receives, (B, V, N, d, e), and the one past the last chunk of the walk.

    heads: how many heads of y belong to a state, and how many of those share a head of x.
    """
    batch, num_tokens, num_x, d = x.shape
    e = y.shape[3]
    num_states, num_chunks = decays.through_BVN.shape[1:]
    states_BVNde = x.new_empty(batch, num_states, num_chunks, d, e, dtype=torch.float32)
    final_BVde = x.new_empty(batch, num_states, d, e, dtype=torch.float32)
    launch(
        tiles.chunk_outer_kernel, (num_chunks, batch * num_states),
        x, y, weight_BVS, states_BVNde, scale, num_tokens, num_chunks, num_x, y.shape[2],
        num_states,
        *heads, decays.chunk, d, e, options.precision, **_launch_options(max(d, e), x.device),
    )  # fmt: skip
    block = 1024
    launch(
        tiles.pass_states_kernel, (num_tiles(d * e, block), batch * num_states),
        states_BVNde, decays.through_BVN, final_BVde if boundary_BVde is None else boundary_BVde,
        final_BVde,
        num_chunks, d * e, boundary_BVde is not None, reverse, block, num_warps=4,
    )  # fmt: skip
    return states_BVNde, final_BVde


def _outputs(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    decays: Decays,
    documents_BS: Tensor | None,
    states_BVNde: Tensor,
    options: ScanOptions,
) -> Tensor:
    heads = options.heads
    batch, num_tokens, _, d = q_BSHd.shape
    e, num_chunks = v_BSVe.shape[3], decays.through_BVN.shape[2]
    out_BSHe = v_BSVe.new_empty(batch, num_tokens, heads.num_outputs, e)
    launch(
        tiles.first_output_kernel, (num_chunks, batch * heads.num_outputs),
        q_BSHd, k_BSGd, v_BSVe, decays.prefix_BVS,
        q_BSHd if documents_BS is None else documents_BS, decays.into_BVS,
        states_BVNde, out_BSHe, options.scale, num_tokens, num_chunks,
        heads.num_queries, heads.num_keys, heads.num_states, heads.num_outputs,
        heads.per_state, heads.per_key, options.chunk, d, e, documents_BS is not None,
        options.precision, **_launch_options(max(d, e), q_BSHd.device),
    )  # fmt: skip
    return out_BSHe


def _forward_states(
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    decays: Decays,
    initial_BVde: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    return _chunk_states(
        k_BSGd,
        v_BSVe,
        decays.out_BVS,
        decays,
        initial_BVde,
        heads=(1, options.heads.per_key),
        scale=1.0,
        options=options,
        reverse=False,
    )


class FirstOrderScan(torch.autograd.Function):
    """Inputs contiguous and checked; see ``trinity_kernels.first_order_scan``."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSVe: Tensor,
        log_decay_BSV: Tensor,
        initial_BVde: Tensor | None,
        documents_BS: Tensor | None,
        options: ScanOptions,
    ) -> tuple[Tensor, Tensor]:
        with on_device_of(q_BSHd):
            decays = chunk_decays(log_decay_BSV, documents_BS, options.chunk)
            states_BVNde, final_BVde = _forward_states(
                k_BSGd, v_BSVe, decays, initial_BVde, options
            )
            out_BSHe = _outputs(q_BSHd, k_BSGd, v_BSVe, decays, documents_BS, states_BVNde, options)
        ctx.save_for_backward(q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, initial_BVde, documents_BS)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out_BSHe, final_BVde

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out_BSHe: Tensor | None, grad_final_BVde: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, initial_BVde, documents_BS = ctx.saved_tensors
        shape = (*v_BSVe.shape[:2], ctx.options.heads.num_outputs, v_BSVe.shape[3])
        grad_BSHe = v_BSVe.new_zeros(shape) if grad_out_BSHe is None else grad_out_BSHe.contiguous()
        with on_device_of(q_BSHd):
            decays = chunk_decays(log_decay_BSV, documents_BS, ctx.options.chunk)
            grads = _backward(
                (q_BSHd, k_BSGd, v_BSVe, grad_BSHe), decays, documents_BS, initial_BVde,
                grad_final_BVde,
                ctx.options,
            )  # fmt: skip
        grad_initial_BVde = grads.pop()
        return *grads, grad_initial_BVde if initial_BVde is not None else None, None, None


def _backward(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    decays: Decays,
    documents_BS: Tensor | None,
    initial_BVde: Tensor | None,
    grad_final_BVde: Tensor | None,
    options: ScanOptions,
) -> list[Tensor]:
    """Gradients of q, k, v, log decay and the initial state."""
    q_BSHd, k_BSGd, v_BSVe, grad_out_BSHe = tokens
    heads = options.heads
    states_BVNde, _ = _forward_states(k_BSGd, v_BSVe, decays, initial_BVde, options)
    grad_states_BVNde, grad_initial_BVde = _chunk_states(
        q_BSHd,
        grad_out_BSHe,
        decays.into_BVS,
        decays,
        None if grad_final_BVde is None else grad_final_BVde.float().contiguous(),
        heads=(heads.per_state, heads.per_key),
        scale=options.scale,
        options=options,
        reverse=True,
    )
    through_BVN = decays.through_BVN * _inner(states_BVNde, grad_states_BVNde)
    *grads, pairs_BVS, leaving_BVS = _token_gradients(
        tokens, decays, documents_BS, states_BVNde, grad_states_BVNde, options
    )
    grad_decay = log_decay_gradient(pairs_BVS, leaving_BVS, through_BVN, decays.chunk)
    return [*grads, grad_decay, grad_initial_BVde]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of the last two dims, as a batched product: no temporary of their size."""
    a, b = a.flatten(-2), b.flatten(-2)
    return (a.unsqueeze(-2) @ b.unsqueeze(-1)).flatten(-3)


def _token_gradients(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    decays: Decays,
    documents_BS: Tensor | None,
    states_BVNde: Tensor,
    grad_states_BVNde: Tensor,
    options: ScanOptions,
) -> tuple[Tensor, ...]:
    q_BSHd, k_BSGd, v_BSVe, grad_out_BSHe = tokens
    heads = options.heads
    batch, num_tokens, _, d = q_BSHd.shape
    e, num_chunks = v_BSVe.shape[3], decays.through_BVN.shape[2]
    together = min(STATES_PER_PROGRAM, heads.per_key)
    while heads.per_key % together:
        together -= 1
    num_programs = heads.num_states // together
    num_q = heads.num_outputs if together == 1 else num_programs
    partial = torch.float32 if num_programs > heads.num_keys else q_BSHd.dtype
    grad_q_BSHd = q_BSHd.new_empty(batch, num_tokens, num_q, d, dtype=partial)
    grad_k_BSGd = k_BSGd.new_empty(batch, num_tokens, num_programs, d, dtype=partial)
    grad_v_BSVe = torch.empty_like(v_BSVe)
    pairs_BVS, leaving_BVS = torch.empty_like(decays.into_BVS), torch.empty_like(decays.into_BVS)
    launch(
        tiles.first_backward_kernel, (num_chunks, batch * num_programs),
        q_BSHd, k_BSGd, v_BSVe, grad_out_BSHe, decays.prefix_BVS,
        q_BSHd if documents_BS is None else documents_BS,
        decays.into_BVS, decays.out_BVS, states_BVNde, grad_states_BVNde,
        grad_q_BSHd, grad_k_BSGd, grad_v_BSVe, pairs_BVS, leaving_BVS, options.scale, num_tokens,
        num_chunks,
        heads.num_queries, heads.num_keys, heads.num_states, heads.num_outputs,
        heads.per_state, heads.per_key, together, options.chunk, d, e,
        documents_BS is not None, options.precision, **_launch_options(max(d, e), q_BSHd.device),
    )  # fmt: skip
    grad_q_BSHd = grad_q_BSHd.unflatten(2, (heads.num_queries, -1)).sum(3).to(q_BSHd.dtype)
    grad_k_BSGd = grad_k_BSGd.unflatten(2, (heads.num_keys, -1)).sum(3).to(k_BSGd.dtype)
    return grad_q_BSHd, grad_k_BSGd, grad_v_BSVe, pairs_BVS, leaving_BVS
