"""Tiles of the first-order scan. One chunk is one tile of positions.

    o_i = scale * ( into_i q_i S_n + sum_{j <= i} (q_i . k_j) exp(S_i - S_j) v_j )
    S_{n+1} = through_n S_n + sum_j out_j k_j (x) v_j

with ``into``, ``out`` and ``through`` from ``decay.chunk_decays``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trinity_kernels.tiles import (
    decay_tile,
    load_matrix,
    load_rows,
    load_scalars,
    matmul,
    store_rows,
    store_scalars,
)


@triton.jit
def chunk_outer_kernel(
    x,
    y,
    weight,
    out,
    scale,
    num_tokens,
    num_chunks,
    num_x,
    num_y,
    num_states,
    PER_STATE: tl.constexpr,
    PER_KEY: tl.constexpr,
    C: tl.constexpr,
    DX: tl.constexpr,
    EY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[b, v, n] = scale * sum over the chunk of weight_t x_t (x) y_t, (DX, EY) fp32.

    Makes chunk states from keys and values, and their gradients from queries and output gradients;
    the latter sum over the ``PER_STATE`` output heads that read the state.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // num_states
    state = row % num_states
    weight_C = load_scalars(weight, row, chunk * C, num_tokens, C)
    acc_de = tl.zeros((DX, EY), dtype=tl.float32)
    for i in range(PER_STATE):
        head = state * PER_STATE + i
        x_Cd = load_rows(x, batch, chunk * C, head // PER_KEY, num_tokens, num_x, C, DX)
        y_Ce = load_rows(y, batch, chunk * C, head, num_tokens, num_y, C, EY)
        acc_de += matmul(tl.trans(x_Cd * weight_C[:, None]), y_Ce, PRECISION)
    at = tl.arange(0, DX)[:, None] * EY + tl.arange(0, EY)[None, :]
    index = row.to(tl.int64) * num_chunks + chunk
    tl.store(out + index * (DX * EY) + at, acc_de * scale)


@triton.jit
def pass_states_kernel(
    states,
    through,
    initial,
    final,
    num_chunks,
    size,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns what each chunk adds into the state each chunk receives, in place.

    states: (rows, N, size) fp32; through: (rows, N). Runs from the last chunk to the first for
    gradients. ``final`` gets the state past the end of the walk.
    """
    row = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    start = row.to(tl.int64) * size
    if HAS_INITIAL:
        carry = tl.load(initial + start + element, mask=inside, other=0.0)
    else:
        carry = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if REVERSE else i
        at = states + (start * num_chunks + chunk * size) + element
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, carry, mask=inside)
        carry = carry * tl.load(through + row * num_chunks + chunk) + added
    tl.store(final + start + element, carry, mask=inside)


@triton.jit
def first_output_kernel(
    q,
    k,
    v,
    prefix,
    documents,
    into,
    states,
    out,
    scale,
    num_tokens,
    num_chunks,
    num_queries,
    num_keys,
    num_states,
    num_outputs,
    PER_STATE: tl.constexpr,
    PER_KEY: tl.constexpr,
    C: tl.constexpr,
    DX: tl.constexpr,
    EY: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one output head."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1) // num_outputs
    head = tl.program_id(1) % num_outputs
    state = head // PER_STATE
    row = batch * num_states + state
    first = chunk * C
    q_Cd = load_rows(q, batch, first, head // PER_KEY, num_tokens, num_queries, C, DX)
    k_Cd = load_rows(k, batch, first, state // PER_KEY, num_tokens, num_keys, C, DX)
    decay_CC, _ = decay_tile(
        prefix, documents, row, batch, first, first, num_tokens, C, C, HAS_DOCUMENTS, False
    )
    weight_CC = matmul(q_Cd, tl.trans(k_Cd), PRECISION) * decay_CC
    state_de = load_matrix(states, row.to(tl.int64) * num_chunks + chunk, DX, EY)
    into_C = load_scalars(into, row, first, num_tokens, C)
    o_Ce = matmul(q_Cd, state_de, PRECISION) * into_C[:, None]
    v_Ce = load_rows(v, batch, first, state, num_tokens, num_states, C, EY)
    o_Ce += matmul(weight_CC, v_Ce, PRECISION)
    store_rows(out, o_Ce * scale, batch, first, head, num_tokens, num_outputs, C, EY)


@triton.jit
def _through_leaving_state(k_Cd, v_Ce, out_C, grad_state_de, PRECISION: tl.constexpr):
    """Gradients of k and v by way of the state that leaves the chunk, and out_j k_j G v_j."""
    grad_k_Cd = matmul(v_Ce, tl.trans(grad_state_de), PRECISION) * out_C[:, None]
    grad_v_Ce = matmul(k_Cd, grad_state_de, PRECISION) * out_C[:, None]
    return grad_k_Cd, grad_v_Ce, tl.sum(grad_k_Cd * k_Cd, axis=1)


@triton.jit
def _within_chunk(q_Cd, k_Cd, v_Ce, do_Ce, decay_CC, off_CC, scale, PRECISION: tl.constexpr):
    """Gradients of pairs inside the chunk, and per token its pairs as query minus as key.

    The diagonal's decay is 1 whatever the decays are; leaving it out keeps its (large, cancelling)
    terms out of their gradient.
    """
    score_CC = matmul(q_Cd, tl.trans(k_Cd), PRECISION) * decay_CC * scale
    grad_CC = matmul(do_Ce, tl.trans(v_Ce), PRECISION)
    pair_CC = tl.where(off_CC, score_CC * grad_CC, 0.0)
    pairs_C = tl.sum(pair_CC, axis=1) - tl.sum(pair_CC, axis=0)
    grad_CC = grad_CC * decay_CC * scale
    grad_q_Cd = matmul(grad_CC, k_Cd, PRECISION)
    grad_k_Cd = matmul(tl.trans(grad_CC), q_Cd, PRECISION)
    grad_v_Ce = matmul(tl.trans(score_CC), do_Ce, PRECISION)
    return grad_q_Cd, grad_k_Cd, grad_v_Ce, pairs_C


@triton.jit
def first_backward_kernel(
    q, k, v, do, prefix, documents, into, out, states, grad_states,
    grad_q, grad_k, grad_v, pairs, leaving, scale, num_tokens, num_chunks,
    num_queries, num_keys, num_states, num_outputs,
    PER_STATE: tl.constexpr, PER_KEY: tl.constexpr, STATES_PER_PROGRAM: tl.constexpr,
    C: tl.constexpr, DX: tl.constexpr, EY: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk.

    A program owns one state and the query heads that read it, or several states of one query and
    key head; it sums what they share. ``grad_k`` has one head per program, ``grad_q`` one per
    output head, or per program that owns several states.
    """
    chunk = tl.program_id(0)
    num_programs = num_states // STATES_PER_PROGRAM
    batch = tl.program_id(1) // num_programs
    program = tl.program_id(1) % num_programs
    first = chunk * C
    grad_q_Cd = tl.zeros((C, DX), dtype=tl.float32)
    grad_k_Cd = tl.zeros((C, DX), dtype=tl.float32)
    for j in range(STATES_PER_PROGRAM):
        state = program * STATES_PER_PROGRAM + j
        row = batch * num_states + state
        index = row.to(tl.int64) * num_chunks + chunk
        k_Cd = load_rows(k, batch, first, state // PER_KEY, num_tokens, num_keys, C, DX)
        v_Ce = load_rows(v, batch, first, state, num_tokens, num_states, C, EY)
        out_C = load_scalars(out, row, first, num_tokens, C)
        into_C = load_scalars(into, row, first, num_tokens, C) * scale
        grad_state_de = load_matrix(grad_states, index, DX, EY)
        k_part, grad_v_Ce, leaving_C = _through_leaving_state(
            k_Cd, v_Ce, out_C, grad_state_de, PRECISION
        )
        grad_k_Cd += k_part
        pairs_C = tl.zeros((C,), dtype=tl.float32)
        decay_CC, off_CC = decay_tile(
            prefix, documents, row, batch, first, first, num_tokens, C, C, HAS_DOCUMENTS, False
        )
        for i in range(PER_STATE):
            head = state * PER_STATE + i
            q_Cd = load_rows(q, batch, first, head // PER_KEY, num_tokens, num_queries, C, DX)
            do_Ce = load_rows(do, batch, first, head, num_tokens, num_outputs, C, EY)
            state_de = load_matrix(states, index, DX, EY)
            entering_Cd = matmul(do_Ce, tl.trans(state_de), PRECISION) * into_C[:, None]
            q_part, k_part, v_part, pair_part = _within_chunk(
                q_Cd, k_Cd, v_Ce, do_Ce, decay_CC, off_CC, scale, PRECISION
            )
            pairs_C += pair_part + tl.sum(entering_Cd * q_Cd, axis=1)
            grad_k_Cd += k_part
            grad_v_Ce += v_part
            grad_q_Cd += q_part + entering_Cd
            if STATES_PER_PROGRAM == 1:
                store_rows(grad_q, grad_q_Cd, batch, first, head, num_tokens, num_outputs, C, DX)
                grad_q_Cd = tl.zeros((C, DX), dtype=tl.float32)
        store_rows(grad_v, grad_v_Ce, batch, first, state, num_tokens, num_states, C, EY)
        store_scalars(pairs, pairs_C, row, first, num_tokens, C)
        store_scalars(leaving, leaving_C, row, first, num_tokens, C)
    if STATES_PER_PROGRAM > 1:
        store_rows(grad_q, grad_q_Cd, batch, first, program, num_tokens, num_programs, C, DX)
    store_rows(grad_k, grad_k_Cd, batch, first, program, num_tokens, num_programs, C, DX)
