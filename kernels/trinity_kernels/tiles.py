"""Loads, stores and products that all kernels share.

Everything is upcast to fp32 as it is loaded: sums stay accurate, and Triton's interpreter, which
the tests run on, computes bf16 wrongly. Row offsets are 64-bit; a batch of long rows has more than
2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, batch, first, head, num_tokens, num_heads, C: tl.constexpr, X: tl.constexpr):
    """C consecutive tokens of one head of a (B, S, heads, X) tensor; zeros past ``num_tokens``."""
    token = first + tl.arange(0, C)
    row = (batch.to(tl.int64) * num_tokens + token) * num_heads + head
    at = ptr + row[:, None] * X + tl.arange(0, X)[None, :]
    return tl.load(at, mask=(token < num_tokens)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    ptr, value, batch, first, head, num_tokens, num_heads, C: tl.constexpr, X: tl.constexpr
):
    """The counterpart of ``load_rows``; rounds to the dtype of the tensor."""
    token = first + tl.arange(0, C)
    row = (batch.to(tl.int64) * num_tokens + token) * num_heads + head
    at = ptr + row[:, None] * X + tl.arange(0, X)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(token < num_tokens)[:, None])


@triton.jit
def load_scalars(ptr, row, first, num_tokens, C: tl.constexpr):
    """C consecutive numbers of one row of a (rows, S) tensor, in its own dtype; zeros past S."""
    token = first + tl.arange(0, C)
    at = ptr + row.to(tl.int64) * num_tokens + token
    return tl.load(at, mask=token < num_tokens, other=0)


@triton.jit
def store_scalars(ptr, value, row, first, num_tokens, C: tl.constexpr):
    """The counterpart of ``load_scalars``."""
    token = first + tl.arange(0, C)
    at = ptr + row.to(tl.int64) * num_tokens + token
    tl.store(at, value, mask=token < num_tokens)


@triton.jit
def load_matrix(ptr, index, R: tl.constexpr, X: tl.constexpr):
    """Matrix number ``index`` of a stack of (R, X) matrices."""
    at = tl.arange(0, R)[:, None] * X + tl.arange(0, X)[None, :]
    return tl.load(ptr + index * (R * X) + at).to(tl.float32)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a @ b of fp32 tiles, accumulated in fp32; operands are cut to tf32 where allowed.

    Numbers of 16-bit tensors survive the cut whole. Factors per row are therefore applied to the
    product, not to an operand, wherever gradients subtract such products from one another.
    """
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """x rounded to what a product keeps of it, so that a sum of x agrees with a product of x.

    Devices cut tf32 operands off instead of rounding them. A row of weights that is summed whole
    but multiplied cut would not average its values: o_0 would miss v_0 by 1e-3.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def log_decay_tile(
    prefix, documents, prefix_row, batch, row_first, column_first, num_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """S_i - S_j for query i and key j <= i of one document, else -inf, (ROWS, COLUMNS) fp32.

    Returns it with the mask of those pairs that are off the diagonal. Prefix sums come in fp64 and
    are subtracted as pairs of fp32 numbers, high and low part: behind one very fast token they are
    large, and their difference is small.
    """
    row = row_first + tl.arange(0, ROWS)
    column = column_first + tl.arange(0, COLUMNS)
    origin = tl.load(prefix + prefix_row.to(tl.int64) * num_tokens + row_first)
    row_sum = load_scalars(prefix, prefix_row, row_first, num_tokens, ROWS) - origin
    column_sum = load_scalars(prefix, prefix_row, column_first, num_tokens, COLUMNS) - origin
    row_high = row_sum.to(tl.float32)
    row_low = (row_sum - row_high.to(tl.float64)).to(tl.float32)
    column_high = column_sum.to(tl.float32)
    column_low = (column_sum - column_high.to(tl.float64)).to(tl.float32)
    difference = row_high[:, None] - column_high[None, :]
    difference += row_low[:, None] - column_low[None, :]
    if ROWS_ARE_KEYS:
        difference = -difference
        reached = column[None, :] >= row[:, None]
    else:
        reached = row[:, None] >= column[None, :]
    reached = reached & (row < num_tokens)[:, None] & (column < num_tokens)[None, :]
    if HAS_DOCUMENTS:
        row_document = load_scalars(documents, batch, row_first, num_tokens, ROWS)
        column_document = load_scalars(documents, batch, column_first, num_tokens, COLUMNS)
        reached = reached & (row_document[:, None] == column_document[None, :])
    off_diagonal = reached & (row[:, None] != column[None, :])
    return tl.where(reached, difference, float("-inf")), off_diagonal


@triton.jit
def decay_tile(
    prefix, documents, prefix_row, batch, row_first, column_first, num_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """exp of ``log_decay_tile``, masked before: above the diagonal the exponential overflows."""
    difference, off_diagonal = log_decay_tile(  # pyright: ignore  (Triton's stubs)
        prefix, documents, prefix_row, batch, row_first, column_first, num_tokens,
        ROWS, COLUMNS, HAS_DOCUMENTS, ROWS_ARE_KEYS,
    )  # fmt: skip
    return tl.exp(difference), off_diagonal


@triton.jit
def row_dot_kernel(a, b, out, num_tokens, num_heads, C: tl.constexpr, X: tl.constexpr):
    """out[b, h, s] = a[b, s, h] . b[b, s, h]: what a softmax-like gradient subtracts."""
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    first = tl.program_id(0) * C
    a_CX = load_rows(a, batch, first, head, num_tokens, num_heads, C, X)
    b_CX = load_rows(b, batch, first, head, num_tokens, num_heads, C, X)
    total_C = tl.sum(a_CX * b_CX, axis=1)
    store_scalars(out, total_C, tl.program_id(1), first, num_tokens, C)
