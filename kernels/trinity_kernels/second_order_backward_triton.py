"""Tiles of the second-order scan: gradients of tokens.

With g_i = do_i / W_i and h_i = -(do_i . o_i) / W_i, W_i the sum of row i's weights (g_i = do_i and
h_i = 0 without normalisation), dw_ij = g_i . v_j + h_i, and

    ds_ij = 2 s_ij exp(S_i - S_j) dw_ij,   s_ij = scale q_i . k_j,   pair_ij = w_ij dw_ij

A state contributes X = T g (+ h times its column of ones), the gradient of a pair's products;
each coordinate of a block collects X times the other block. Half of q . dq is then what the
decays of the state collect, since features are quadratic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trinity_kernels.forgetting_triton import first_key, last_query
from trinity_kernels.second_order_triton import load_block, load_state, load_sums, products
from trinity_kernels.tiles import (
    decay_tile,
    load_rows,
    load_scalars,
    matmul,
    store_rows,
    store_scalars,
)


@triton.jit
def _place(block_CB, block, C: tl.constexpr, DX: tl.constexpr, BLOCK: tl.constexpr):
    """A block of coordinates in its place among all d, zeros elsewhere, (C, d / BLOCK, BLOCK)."""
    there = tl.arange(0, DX // BLOCK)[None, :, None] == block
    return tl.where(there, block_CB[:, None, :], 0.0)


@triton.jit
def _products_gradient(
    grad_CF, left_CI, right_CJ, left, right,
    C: tl.constexpr, DX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of all coordinates from that of the products of one pair of blocks."""
    grad_CIJ = tl.reshape(grad_CF, (C, BLOCK, BLOCK))
    grad_left_CI = tl.sum(grad_CIJ * right_CJ[:, None, :], axis=2)
    grad_right_CJ = tl.sum(grad_CIJ * left_CI[:, :, None], axis=1)
    return _place(grad_left_CI, left, C, DX, BLOCK) + _place(grad_right_CJ, right, C, DX, BLOCK)


@triton.jit
def _query_state_gradient(
    q, pairs, states, sums, do_Ce, inverse_C, slope_C, batch, first, head, index, num_visible,
    num_tokens, num_queries, num_pairs, C: tl.constexpr, DX: tl.constexpr, EY: tl.constexpr,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries by way of phi(q) S, (C, d)."""
    F: tl.constexpr = BLOCK * BLOCK
    grad_CnB = tl.zeros((C, DX // BLOCK, BLOCK), dtype=tl.float32)
    for pair in range(num_visible):
        left = tl.load(pairs + pair)
        right = tl.load(pairs + num_pairs + pair)
        left_CI = load_block(q, batch, first, head, left, num_tokens, num_queries, C, DX, BLOCK)
        right_CJ = load_block(q, batch, first, head, right, num_tokens, num_queries, C, DX, BLOCK)
        state_Fe = load_state(states, index, pair, num_pairs, 0, F, EY, EY)
        grad_CF = matmul(do_Ce, tl.trans(state_Fe), PRECISION)
        if NORMALIZE:
            grad_CF = grad_CF * inverse_C[:, None]
            grad_CF += slope_C[:, None] * load_sums(sums, index, pair, num_pairs, F)[None, :]
        grad_CF *= tl.where(left == right, 1.0, 2.0)
        grad_CnB += _products_gradient(grad_CF, left_CI, right_CJ, left, right, C, DX, BLOCK)
    return tl.reshape(grad_CnB, (C, DX))


@triton.jit
def _output_gradient(
    do, inverse, slope, batch, first, head, num_tokens, num_outputs,
    C: tl.constexpr, EY: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """do (C, e), 1 / W and h (C,) of the file's head; 1 and 0 without normalisation."""
    do_Ce = load_rows(do, batch, first, head, num_tokens, num_outputs, C, EY)
    inverse_C = tl.full((C,), 1.0, dtype=tl.float32)
    slope_C = tl.zeros((C,), dtype=tl.float32)
    if NORMALIZE:
        out_row = batch * num_outputs + head
        inverse_C *= load_scalars(inverse, out_row, first, num_tokens, C)
        slope_C += load_scalars(slope, out_row, first, num_tokens, C)
    return do_Ce, inverse_C, slope_C


@triton.jit
def second_query_kernel(
    q, k, v, do, prefix, documents, into, pairs, states, sums, inverse, slope,
    grad_q, query_pairs, scale, num_tokens, num_chunks, chunk_size,
    num_queries, num_keys, num_states, num_outputs, num_pairs,
    PER_STATE: tl.constexpr, PER_KEY: tl.constexpr, C: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of C queries of one output head, and what their decays collect as queries."""
    batch = tl.program_id(1) // num_outputs
    head = tl.program_id(1) % num_outputs
    state = head // PER_STATE
    row = batch * num_states + state
    first = tl.program_id(0) * C
    chunk = first // chunk_size
    do_Ce, inverse_C, slope_C = _output_gradient(  # pyright: ignore  (Triton's stubs)
        do, inverse, slope, batch, first, head, num_tokens, num_outputs, C, EY, NORMALIZE
    )
    q_Cd = load_rows(q, batch, first, head // PER_KEY, num_tokens, num_queries, C, DX)
    grad_q_Cd = tl.zeros((C, DX), dtype=tl.float32)
    pairs_C = tl.zeros((C,), dtype=tl.float32)
    if HAS_STATES:
        index = row.to(tl.int64) * num_chunks + chunk
        num_visible = num_pairs if HAS_INITIAL else tl.where(chunk > 0, num_pairs, 0)
        grad_q_Cd += _query_state_gradient(
            q, pairs, states, sums, do_Ce, inverse_C, slope_C, batch, first, head // PER_KEY, index,
            num_visible, num_tokens, num_queries, num_pairs, C, DX, EY, BLOCK, NORMALIZE, PRECISION,
        )  # fmt: skip
        grad_q_Cd *= load_scalars(into, row, first, num_tokens, C)[:, None]
        pairs_C += 0.5 * tl.sum(grad_q_Cd * q_Cd, axis=1)
    start = first_key(documents, batch, first, num_tokens, C, HAS_DOCUMENTS)
    end = tl.minimum(first + C, num_tokens)
    for at in range(tl.maximum(start, chunk * chunk_size), end, C):
        k_Cd = load_rows(k, batch, at, state // PER_KEY, num_tokens, num_keys, C, DX)
        v_Ce = load_rows(v, batch, at, state, num_tokens, num_states, C, EY)
        decay_CC, off_CC = decay_tile(
            prefix, documents, row, batch, first, at, num_tokens, C, C, HAS_DOCUMENTS, False
        )
        score_CC = matmul(q_Cd, tl.trans(k_Cd), PRECISION) * scale
        grad_CC = matmul(do_Ce, tl.trans(v_Ce), PRECISION) * inverse_C[:, None]
        grad_CC += slope_C[:, None]
        grad_CC = score_CC * decay_CC * grad_CC
        pairs_C += tl.sum(tl.where(off_CC, score_CC * grad_CC, 0.0), axis=1)
        grad_q_Cd += matmul(grad_CC * (2.0 * scale), k_Cd, PRECISION)
    store_rows(grad_q, grad_q_Cd, batch, first, head, num_tokens, num_outputs, C, DX)
    store_scalars(query_pairs, pairs_C, tl.program_id(1), first, num_tokens, C)


@triton.jit
def _key_state_gradient(
    k, v_Ce, pairs, states, sums, batch, first, head, index, scale, num_tokens, num_keys,
    num_pairs, C: tl.constexpr, DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys (C, d) and values (C, e) by way of the state that leaves the chunk."""
    F: tl.constexpr = BLOCK * BLOCK
    grad_CnB = tl.zeros((C, DX // BLOCK, BLOCK), dtype=tl.float32)
    grad_v_Ce = tl.zeros((C, EY), dtype=tl.float32)
    for pair in range(num_pairs):
        left = tl.load(pairs + pair)
        right = tl.load(pairs + num_pairs + pair)
        left_CI = load_block(k, batch, first, head, left, num_tokens, num_keys, C, DX, BLOCK)
        right_CJ = load_block(k, batch, first, head, right, num_tokens, num_keys, C, DX, BLOCK)
        left_CI *= scale
        right_CJ *= scale
        state_Fe = load_state(states, index, pair, num_pairs, 0, F, EY, EY)
        grad_v_Ce += matmul(products(left_CI, right_CJ, C, BLOCK), state_Fe, PRECISION)
        grad_CF = matmul(v_Ce, tl.trans(state_Fe), PRECISION)
        if NORMALIZE:
            grad_CF += load_sums(sums, index, pair, num_pairs, F)[None, :]
        grad_CnB += _products_gradient(grad_CF, left_CI, right_CJ, left, right, C, DX, BLOCK)
    return tl.reshape(grad_CnB, (C, DX)) * scale, grad_v_Ce


@triton.jit
def second_key_kernel(
    q, k, v, do, prefix, documents, ends, leaving, pairs, grad_states, grad_sums, inverse, slope,
    grad_k, grad_v, key_pairs, state_pairs, scale, num_tokens, num_chunks, chunk_size,
    num_queries, num_keys, num_states, num_outputs, num_pairs,
    PER_STATE: tl.constexpr, PER_KEY: tl.constexpr, C: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_GRAD_STATES: tl.constexpr, HAS_OUTPUT: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of C keys and values of one state, and what their decays collect as keys.

    ``grad_states`` are those of the states that leave the chunks. ``key_pairs`` gets the sum over
    queries of the chunk, ``state_pairs`` what goes through the leaving state.
    """
    batch = tl.program_id(1) // num_states
    state = tl.program_id(1) % num_states
    row = tl.program_id(1)
    first = tl.program_id(0) * C
    chunk = first // chunk_size
    k_Cd = load_rows(k, batch, first, state // PER_KEY, num_tokens, num_keys, C, DX)
    v_Ce = load_rows(v, batch, first, state, num_tokens, num_states, C, EY)
    grad_k_Cd = tl.zeros((C, DX), dtype=tl.float32)
    grad_v_Ce = tl.zeros((C, EY), dtype=tl.float32)
    pairs_C = tl.zeros((C,), dtype=tl.float32)
    if HAS_GRAD_STATES:
        index = row.to(tl.int64) * num_chunks + chunk
        k_part, v_part = _key_state_gradient(
            k, v_Ce, pairs, grad_states, grad_sums, batch, first, state // PER_KEY, index, scale,
            num_tokens, num_keys, num_pairs, C, DX, EY, BLOCK, NORMALIZE, PRECISION,
        )  # fmt: skip
        leaving_C = load_scalars(leaving, row, first, num_tokens, C)
        grad_k_Cd += k_part * leaving_C[:, None]
        grad_v_Ce += v_part * leaving_C[:, None]
        state_C = 0.5 * tl.sum(grad_k_Cd * k_Cd, axis=1)
        store_scalars(state_pairs, state_C, row, first, num_tokens, C)
    end = tl.minimum(chunk * chunk_size + chunk_size, num_tokens)
    end = tl.minimum(end, last_query(ends, batch, first + C - 1, num_tokens, HAS_DOCUMENTS))
    for i in range(PER_STATE if HAS_OUTPUT else 0):
        head = state * PER_STATE + i
        for at in range(first, end, C):
            q_Cd = load_rows(q, batch, at, head // PER_KEY, num_tokens, num_queries, C, DX)
            do_Ce, inverse_C, slope_C = _output_gradient(
                do, inverse, slope, batch, at, head, num_tokens, num_outputs, C, EY, NORMALIZE
            )
            decay_CC, off_CC = decay_tile(
                prefix, documents, row, batch, first, at, num_tokens, C, C, HAS_DOCUMENTS, True
            )
            score_CC = matmul(k_Cd, tl.trans(q_Cd), PRECISION) * scale
            weight_CC = score_CC * decay_CC
            grad_CC = matmul(v_Ce, tl.trans(do_Ce), PRECISION) * inverse_C[None, :]
            grad_CC += slope_C[None, :]
            shared_CC = weight_CC * score_CC * inverse_C[None, :]
            grad_v_Ce += matmul(shared_CC, do_Ce, PRECISION)
            grad_CC = weight_CC * grad_CC
            pairs_C += tl.sum(tl.where(off_CC, score_CC * grad_CC, 0.0), axis=1)
            grad_k_Cd += matmul(grad_CC * (2.0 * scale), q_Cd, PRECISION)
    store_rows(grad_k, grad_k_Cd, batch, first, state, num_tokens, num_states, C, DX)
    store_rows(grad_v, grad_v_Ce, batch, first, state, num_tokens, num_states, C, EY)
    store_scalars(key_pairs, pairs_C, row, first, num_tokens, C)
