"""Tiles of the second-order scan: states and outputs.

    w_ij = (scale q_i . k_j)^2 exp(S_i - S_j)      o_i = sum_j w_ij [v_j, 1]
    S_{n+1} = through_n S_n + sum_j out_j phi(scale k_j) (x) [v_j, 1]
    o_i     = into_i phi(q_i) S_n + sum over j of the chunk of w_ij [v_j, 1]

phi is made of products of two blocks of coordinates, ``triangle`` says in which order. A chunk is
several tiles of positions; with one chunk and no state this is plain quadratic attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trinity_kernels.forgetting_triton import first_key
from trinity_kernels.tiles import (
    as_operand,
    decay_tile,
    load_rows,
    load_scalars,
    matmul,
    store_rows,
    store_scalars,
)


@triton.jit
def load_block(
    ptr, batch, first, head, block, num_tokens, num_heads,
    C: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Coordinates of one block of C tokens, (C, BLOCK) fp32."""
    token = first + tl.arange(0, C)
    row = (batch.to(tl.int64) * num_tokens + token) * num_heads + head
    at = ptr + row[:, None] * X + block * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(at, mask=(token < num_tokens)[:, None], other=0.0).to(tl.float32)


@triton.jit
def products(left_CI, right_CJ, C: tl.constexpr, BLOCK: tl.constexpr):
    """All products of two blocks of coordinates, (C, BLOCK * BLOCK)."""
    return tl.reshape(left_CI[:, :, None] * right_CJ[:, None, :], (C, BLOCK * BLOCK))


@triton.jit
def load_state(ptr, index, pair, num_pairs, column, F: tl.constexpr, EY: tl.constexpr,
               WIDTH: tl.constexpr):  # fmt: skip
    """Columns of one pair's part of state number ``index``, (F, WIDTH) fp32."""
    feature = (index * num_pairs + pair) * F + tl.arange(0, F)
    return tl.load(ptr + feature[:, None] * EY + column + tl.arange(0, WIDTH)[None, :])


@triton.jit
def load_sums(ptr, index, pair, num_pairs, F: tl.constexpr):
    """The column of ones of one pair's part of state number ``index``, (F,) fp32."""
    return tl.load(ptr + (index * num_pairs + pair) * F + tl.arange(0, F))


@triton.jit
def _store_state(
    values, sums, value_FE, sum_F, index, pair, num_pairs, column,
    F: tl.constexpr, EY: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    feature = (index * num_pairs + pair) * F + tl.arange(0, F)
    tl.store(values + feature[:, None] * EY + column + tl.arange(0, WIDTH)[None, :], value_FE)
    if NORMALIZE:
        # Every tile of columns has the same sums; one of them writes.
        tl.store(sums + feature, sum_F, mask=(feature >= 0) & (column == 0))


@triton.jit
def _row_weights(
    weight, inverse, slope, row, output_row, first, num_tokens,
    C: tl.constexpr, OF_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """What multiplies a row of y, and what stands in its column of ones, both (C,)."""
    weight_C = load_scalars(weight, row, first, num_tokens, C)
    if OF_OUTPUTS:
        inverse_C = load_scalars(inverse, output_row, first, num_tokens, C)
        slope_C = load_scalars(slope, output_row, first, num_tokens, C)
        return weight_C * inverse_C, weight_C * slope_C
    else:
        return weight_C, weight_C


@triton.jit
def _first_state(
    initial, initial_sums, index, pair, num_pairs, column,
    F: tl.constexpr, EY: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The state a walk begins with."""
    value_FE = tl.zeros((F, WIDTH), dtype=tl.float32)
    sum_F = tl.zeros((F,), dtype=tl.float32)
    if HAS_INITIAL:
        value_FE += load_state(initial, index, pair, num_pairs, column, F, EY, WIDTH)
        if NORMALIZE:
            sum_F += load_sums(initial_sums, index, pair, num_pairs, F)
    return value_FE, sum_F


@triton.jit
def second_state_kernel(
    x, y, weight, inverse, slope, through, pairs, initial, initial_sums, states, sums,
    final, final_sums, x_scale, num_tokens, num_chunks, chunk_size,
    num_x, num_y, num_states, num_pairs,
    PER_STATE: tl.constexpr, PER_KEY: tl.constexpr, C: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP_ALL: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pair of blocks of one state, carried through all chunks.

    Forward: x are keys, y values, ``weight`` what leaves the chunk. In reverse, for gradients: x
    are queries, y output gradients times ``inverse``, ``slope`` the column of ones, ``weight`` what
    enters; unequal blocks count twice. Stores the state of each chunk, and the one past the last.
    """
    F: tl.constexpr = BLOCK * BLOCK
    pair = tl.program_id(0)
    row = tl.program_id(1)
    column = tl.program_id(2) * WIDTH
    batch = row // num_states
    left = tl.load(pairs + pair)
    right = tl.load(pairs + num_pairs + pair)
    factor = x_scale * x_scale
    if REVERSE:
        factor = tl.where(left == right, factor, 2.0 * factor)
    start = row.to(tl.int64)
    value_FE, sum_F = _first_state(  # pyright: ignore  (Triton's stubs)
        initial, initial_sums, start, pair, num_pairs, column, F, EY, WIDTH, NORMALIZE, HAS_INITIAL
    )
    for i in range(num_chunks):
        chunk = num_chunks - 1 - i if REVERSE else i
        if KEEP_ALL:
            _store_state(
                states, sums, value_FE, sum_F, start * num_chunks + chunk, pair, num_pairs, column,
                F, EY, WIDTH, NORMALIZE,
            )  # fmt: skip
        left_over = tl.load(through + start * num_chunks + chunk)
        value_FE *= left_over
        sum_F *= left_over
        first = chunk * chunk_size
        for at in range(first, tl.minimum(first + chunk_size, num_tokens), C):
            for j in range(PER_STATE):
                head = (row % num_states) * PER_STATE + j
                x_head = head // PER_KEY
                left_CI = load_block(x, batch, at, x_head, left, num_tokens, num_x, C, DX, BLOCK)
                right_CJ = load_block(x, batch, at, x_head, right, num_tokens, num_x, C, DX, BLOCK)
                feature_CF = products(left_CI * factor, right_CJ, C, BLOCK)
                y_CE = _load_columns(y, batch, at, head, column, num_tokens, num_y, C, EY, WIDTH)
                value_C, one_C = _row_weights(
                    weight, inverse, slope, row, batch * num_y + head, at, num_tokens, C,
                    NORMALIZE and REVERSE,
                )  # fmt: skip
                weighted_CF = as_operand(feature_CF * value_C[:, None], PRECISION)
                value_FE += matmul(tl.trans(weighted_CF), y_CE, PRECISION)
                if NORMALIZE:
                    one_CF = feature_CF * one_C[:, None] if REVERSE else weighted_CF
                    sum_F += tl.sum(one_CF, axis=0)
    _store_state(
        final, final_sums, value_FE, sum_F, start, pair, num_pairs, column, F, EY, WIDTH, NORMALIZE
    )


@triton.jit
def _load_columns(
    ptr, batch, first, head, column, num_tokens, num_heads,
    C: tl.constexpr, X: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = first + tl.arange(0, C)
    row = (batch.to(tl.int64) * num_tokens + token) * num_heads + head
    at = ptr + row[:, None] * X + column + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=(token < num_tokens)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _read_state(
    q, pairs, states, sums, batch, first, head, index, num_visible, num_tokens, num_queries,
    num_pairs, C: tl.constexpr, DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(q) S, (C, e), and phi(q) times the column of ones, (C,), pair by pair."""
    F: tl.constexpr = BLOCK * BLOCK
    acc_Ce = tl.zeros((C, EY), dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    for pair in range(num_visible):
        left = tl.load(pairs + pair)
        right = tl.load(pairs + num_pairs + pair)
        left_CI = load_block(q, batch, first, head, left, num_tokens, num_queries, C, DX, BLOCK)
        right_CJ = load_block(q, batch, first, head, right, num_tokens, num_queries, C, DX, BLOCK)
        left_CI *= tl.where(left == right, 1.0, 2.0)
        feature_CF = as_operand(products(left_CI, right_CJ, C, BLOCK), PRECISION)
        state_Fe = load_state(states, index, pair, num_pairs, 0, F, EY, EY)
        acc_Ce += matmul(feature_CF, state_Fe, PRECISION)
        if NORMALIZE:
            sum_F = load_sums(sums, index, pair, num_pairs, F)
            total_C += tl.sum(feature_CF * sum_F[None, :], axis=1)
    return acc_Ce, total_C


@triton.jit
def second_output_kernel(
    q, k, v, prefix, documents, into, pairs, states, sums, out, rest, inverse, scale,
    num_tokens, num_chunks, chunk_size, num_queries, num_keys, num_states, num_outputs, num_pairs,
    TINY: tl.constexpr, PER_STATE: tl.constexpr, PER_KEY: tl.constexpr, C: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    """C positions of one output head: what the state gives, and the pairs inside the chunk.

    ``inverse`` gets one over the sum of weights, zero where there are none to speak of; ``rest``
    what rounding to 16 bits takes from the output.
    """
    batch = tl.program_id(1) // num_outputs
    head = tl.program_id(1) % num_outputs
    state = head // PER_STATE
    row = batch * num_states + state
    first = tl.program_id(0) * C
    chunk = first // chunk_size
    acc_Ce = tl.zeros((C, EY), dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    if HAS_STATES:
        index = row.to(tl.int64) * num_chunks + chunk
        num_visible = num_pairs if HAS_INITIAL else tl.where(chunk > 0, num_pairs, 0)
        state_Ce, state_C = _read_state(
            q, pairs, states, sums, batch, first, head // PER_KEY, index, num_visible, num_tokens,
            num_queries, num_pairs, C, DX, EY, BLOCK, NORMALIZE, PRECISION,
        )  # fmt: skip
        into_C = load_scalars(into, row, first, num_tokens, C)
        acc_Ce += state_Ce * into_C[:, None]
        total_C += state_C * into_C
    q_Cd = load_rows(q, batch, first, head // PER_KEY, num_tokens, num_queries, C, DX)
    start = first_key(documents, batch, first, num_tokens, C, HAS_DOCUMENTS)
    end = tl.minimum(first + C, num_tokens)
    for at in range(tl.maximum(start, chunk * chunk_size), end, C):
        k_Cd = load_rows(k, batch, at, state // PER_KEY, num_tokens, num_keys, C, DX)
        decay_CC, _ = decay_tile(
            prefix, documents, row, batch, first, at, num_tokens, C, C, HAS_DOCUMENTS, False
        )
        score_CC = matmul(q_Cd, tl.trans(k_Cd), PRECISION) * scale
        weight_CC = as_operand(score_CC * score_CC * decay_CC, PRECISION)
        v_Ce = load_rows(v, batch, at, state, num_tokens, num_states, C, EY)
        acc_Ce += matmul(weight_CC, v_Ce, PRECISION)
        total_C += tl.sum(weight_CC, axis=1)
    if NORMALIZE:
        exists_C = total_C > TINY
        inverse_C = tl.where(exists_C, 1.0 / tl.where(exists_C, total_C, 1.0), 0.0)
        acc_Ce *= inverse_C[:, None]
        store_scalars(inverse, inverse_C, tl.program_id(1), first, num_tokens, C)
    store_rows(out, acc_Ce, batch, first, head, num_tokens, num_outputs, C, EY)
    if HAS_REST:
        rest_Ce = acc_Ce - acc_Ce.to(out.dtype.element_ty).to(tl.float32)
        store_rows(rest, rest_Ce, batch, first, head, num_tokens, num_outputs, C, EY)
