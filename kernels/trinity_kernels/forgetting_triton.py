"""Tiles of softmax attention with a forget gate (2Mamba-E).

    x_ij = scale q_i . k_j + S_i - S_j,   p_ij = exp(x_ij - lse_i),   o_i = sum_j p_ij v_j
    R_ij = do_i . v_j - do_i . o_i,       dx_ij = p_ij R_ij

Keys and queries of other documents are masked; whole tiles of them are never visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trinity_kernels.tiles import (
    as_operand,
    load_rows,
    load_scalars,
    log_decay_tile,
    matmul,
    store_rows,
    store_scalars,
)


@triton.jit
def first_key(
    documents, batch, first, num_tokens, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr
):
    """Where the walk over keys begins: the tile that holds the beginning of the first document."""
    if HAS_DOCUMENTS:
        begin = tl.load(documents + batch.to(tl.int64) * num_tokens + first)
        return begin // BLOCK * BLOCK
    else:
        return first * 0


@triton.jit
def last_query(ends, batch, last, num_tokens, HAS_DOCUMENTS: tl.constexpr):
    """Where the walk over queries ends: one past the last document that a tile of keys reaches."""
    last = tl.minimum(last, num_tokens - 1)
    if HAS_DOCUMENTS:
        return tl.load(ends + batch.to(tl.int64) * num_tokens + last)
    else:
        return last * 0 + num_tokens


@triton.jit
def forgetting_forward_kernel(
    q, k, v, prefix, documents, out, lse, scale, num_tokens, num_queries, num_keys,
    PER_STATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M queries of one head against all keys they reach, N at a time, with a running maximum."""
    batch = tl.program_id(1) // num_queries
    head = tl.program_id(1) % num_queries
    key_head = head // PER_STATE
    first = tl.program_id(0) * M
    q_Md = load_rows(q, batch, first, head, num_tokens, num_queries, M, DX)
    top_M = tl.full((M,), float("-inf"), dtype=tl.float32)
    total_M = tl.zeros((M,), dtype=tl.float32)
    acc_Me = tl.zeros((M, EY), dtype=tl.float32)
    start = first_key(documents, batch, first, num_tokens, N, HAS_DOCUMENTS)
    for at in range(start, tl.minimum(first + M, num_tokens), N):
        k_Nd = load_rows(k, batch, at, key_head, num_tokens, num_keys, N, DX)
        decay_MN, _ = log_decay_tile(
            prefix, documents, batch * num_keys + key_head, batch, first, at, num_tokens,
            M, N, HAS_DOCUMENTS, False,
        )  # fmt: skip
        x_MN = matmul(q_Md, tl.trans(k_Nd), PRECISION) * scale + decay_MN
        new_M = tl.maximum(top_M, tl.max(x_MN, axis=1))
        # A row whose document has not begun has seen nothing: -inf minus -inf is not a number.
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        p_MN = as_operand(tl.exp(x_MN - safe_M[:, None]), PRECISION)
        keep_M = tl.exp(top_M - safe_M)
        total_M = total_M * keep_M + tl.sum(p_MN, axis=1)
        v_Ne = load_rows(v, batch, at, key_head, num_tokens, num_keys, N, EY)
        acc_Me = acc_Me * keep_M[:, None] + matmul(p_MN, v_Ne, PRECISION)
        top_M = new_M
    # Rows past the end have no key at all; they are not stored.
    total_M = tl.where(total_M == 0.0, 1.0, total_M)
    store_rows(out, acc_Me / total_M[:, None], batch, first, head, num_tokens, num_queries, M, EY)
    store_scalars(lse, top_M + tl.log(total_M), tl.program_id(1), first, num_tokens, M)


@triton.jit
def forgetting_query_kernel(
    q, k, v, do, prefix, documents, lse, delta, grad_q, pairs,
    scale, num_tokens, num_queries, num_keys,
    PER_STATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of M queries, and the sum of dx over the keys of each, the diagonal left out.

    With the diagonal that sum is zero, but only up to the rounding of tf32 products; what the keys
    sum up has the same rounding, and the difference of the two has none of it.
    """
    batch = tl.program_id(1) // num_queries
    head = tl.program_id(1) % num_queries
    key_head = head // PER_STATE
    first = tl.program_id(0) * M
    q_Md = load_rows(q, batch, first, head, num_tokens, num_queries, M, DX)
    do_Me = load_rows(do, batch, first, head, num_tokens, num_queries, M, EY)
    lse_M = load_scalars(lse, tl.program_id(1), first, num_tokens, M)
    delta_M = load_scalars(delta, tl.program_id(1), first, num_tokens, M)
    grad_q_Md = tl.zeros((M, DX), dtype=tl.float32)
    pairs_M = tl.zeros((M,), dtype=tl.float32)
    start = first_key(documents, batch, first, num_tokens, N, HAS_DOCUMENTS)
    for at in range(start, tl.minimum(first + M, num_tokens), N):
        k_Nd = load_rows(k, batch, at, key_head, num_tokens, num_keys, N, DX)
        v_Ne = load_rows(v, batch, at, key_head, num_tokens, num_keys, N, EY)
        decay_MN, off_MN = log_decay_tile(
            prefix, documents, batch * num_keys + key_head, batch, first, at, num_tokens,
            M, N, HAS_DOCUMENTS, False,
        )  # fmt: skip
        x_MN = matmul(q_Md, tl.trans(k_Nd), PRECISION) * scale + decay_MN
        grad_MN = matmul(do_Me, tl.trans(v_Ne), PRECISION) - delta_M[:, None]
        grad_MN = tl.exp(x_MN - lse_M[:, None]) * grad_MN
        grad_q_Md += matmul(grad_MN, k_Nd, PRECISION)
        pairs_M += tl.sum(tl.where(off_MN, grad_MN, 0.0), axis=1)
    store_rows(grad_q, grad_q_Md * scale, batch, first, head, num_tokens, num_queries, M, DX)
    store_scalars(pairs, pairs_M, tl.program_id(1), first, num_tokens, M)


@triton.jit
def forgetting_key_kernel(
    q, k, v, do, prefix, documents, ends, lse, delta, grad_k, grad_v, pairs,
    scale, num_tokens, num_queries, num_keys,
    PER_STATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DX: tl.constexpr, EY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of N keys and values over all queries that reach them, tiles transposed."""
    batch = tl.program_id(1) // num_keys
    key_head = tl.program_id(1) % num_keys
    first = tl.program_id(0) * N
    k_Nd = load_rows(k, batch, first, key_head, num_tokens, num_keys, N, DX)
    v_Ne = load_rows(v, batch, first, key_head, num_tokens, num_keys, N, EY)
    grad_k_Nd = tl.zeros((N, DX), dtype=tl.float32)
    grad_v_Ne = tl.zeros((N, EY), dtype=tl.float32)
    pairs_N = tl.zeros((N,), dtype=tl.float32)
    end = last_query(ends, batch, first + N - 1, num_tokens, HAS_DOCUMENTS)
    for i in range(PER_STATE):
        head = key_head * PER_STATE + i
        row = batch * num_queries + head
        for at in range(first // M * M, end, M):
            q_Md = load_rows(q, batch, at, head, num_tokens, num_queries, M, DX)
            do_Me = load_rows(do, batch, at, head, num_tokens, num_queries, M, EY)
            decay_NM, off_NM = log_decay_tile(
                prefix, documents, tl.program_id(1), batch, first, at, num_tokens,
                N, M, HAS_DOCUMENTS, True,
            )  # fmt: skip
            x_NM = matmul(k_Nd, tl.trans(q_Md), PRECISION) * scale + decay_NM
            p_NM = tl.exp(x_NM - load_scalars(lse, row, at, num_tokens, M)[None, :])
            grad_v_Ne += matmul(p_NM, do_Me, PRECISION)
            delta_M = load_scalars(delta, row, at, num_tokens, M)
            grad_NM = p_NM * (matmul(v_Ne, tl.trans(do_Me), PRECISION) - delta_M[None, :])
            grad_k_Nd += matmul(grad_NM, q_Md, PRECISION)
            pairs_N += tl.sum(tl.where(off_NM, grad_NM, 0.0), axis=1)
    store_rows(grad_k, grad_k_Nd * scale, batch, first, key_head, num_tokens, num_keys, N, DX)
    store_rows(grad_v, grad_v_Ne, batch, first, key_head, num_tokens, num_keys, N, EY)
    store_scalars(pairs, pairs_N, tl.program_id(1), first, num_tokens, N)
