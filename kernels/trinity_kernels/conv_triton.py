"""Tiles of the depthwise causal convolution: (BLOCK_S positions, BLOCK_C channels) of one row.

    pre_t = bias + sum_{m < w} weight[:, w - 1 - m] x_{t - m},   y_t = act(pre_t)

Positions before the row are the last of ``initial``, which belong to the first document.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _document(documents, batch, position, num_tokens, HAS_DOCUMENTS: tl.constexpr):
    """Document of each position; those before the row belong to its first document."""
    if HAS_DOCUMENTS:
        at = tl.minimum(tl.maximum(position, 0), num_tokens - 1)
        return tl.load(documents + batch.to(tl.int64) * num_tokens + at)
    else:
        return position * 0


@triton.jit
def _load_inputs(
    x, initial, batch, position, channel, num_tokens, num_channels,
    WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """x at the positions, (BLOCK_S, BLOCK_C) fp32: from ``initial`` before the row, else zero."""
    inside = (channel < num_channels)[None, :]
    in_row = (position >= 0) & (position < num_tokens)
    row = (batch.to(tl.int64) * num_tokens + position) * num_channels
    at = x + row[:, None] + channel[None, :]
    value = tl.load(at, mask=in_row[:, None] & inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = position + (WIDTH - 1)
        in_initial = (before >= 0) & (position < 0)
        row = (batch.to(tl.int64) * (WIDTH - 1) + before) * num_channels
        at = initial + row[:, None] + channel[None, :]
        value += tl.load(at, mask=in_initial[:, None] & inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _load_tap(weight, channel, num_channels, tap, WIDTH: tl.constexpr):
    at = weight + channel * WIDTH + tap
    return tl.load(at, mask=channel < num_channels, other=0.0).to(tl.float32)


@triton.jit
def _preactivation(
    x, weight, bias, documents, initial, batch, position, channel, num_tokens, num_channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """bias + all taps at the positions, (BLOCK_S, BLOCK_C) fp32."""
    own = _document(documents, batch, position, num_tokens, HAS_DOCUMENTS)
    pre = tl.zeros((position.shape[0], channel.shape[0]), dtype=tl.float32)
    if HAS_BIAS:
        pre += tl.load(bias + channel, mask=channel < num_channels, other=0.0).to(tl.float32)[
            None, :
        ]
    for m in tl.static_range(WIDTH):
        value = _load_inputs(
            x, initial, batch, position - m, channel, num_tokens, num_channels, WIDTH, HAS_INITIAL
        )
        same = _document(documents, batch, position - m, num_tokens, HAS_DOCUMENTS) == own
        tap = _load_tap(weight, channel, num_channels, WIDTH - 1 - m, WIDTH)
        pre += tl.where(same[:, None], value * tap[None, :], 0.0)
    return pre


@triton.jit
def conv_forward_kernel(
    x, weight, bias, documents, initial, y, num_tokens, num_channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one tile."""
    batch = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pre = _preactivation(
        x, weight, bias, documents, initial, batch, position, channel, num_tokens, num_channels,
        WIDTH, HAS_BIAS, HAS_DOCUMENTS, HAS_INITIAL,
    )  # fmt: skip
    if SILU:
        pre = pre * tl.sigmoid(pre)
    row = (batch.to(tl.int64) * num_tokens + position) * num_channels
    inside = (position < num_tokens)[:, None] & (channel < num_channels)[None, :]
    tl.store(y + row[:, None] + channel[None, :], pre.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _grad_preactivation(
    x, weight, bias, documents, initial, dy, batch, position, channel, num_tokens, num_channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation, zero outside the row. Taps are summed anew: x is in cache."""
    inside = ((position >= 0) & (position < num_tokens))[:, None] & (channel < num_channels)[
        None, :
    ]
    row = (batch.to(tl.int64) * num_tokens + position) * num_channels
    grad = tl.load(dy + row[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        pre = _preactivation(
            x, weight, bias, documents, initial, batch, position, channel, num_tokens,
            num_channels, WIDTH, HAS_BIAS, HAS_DOCUMENTS, HAS_INITIAL,
        )  # fmt: skip
        gate = tl.sigmoid(pre)
        grad = grad * gate * (1.0 + pre * (1.0 - gate))
    return grad


@triton.jit
def conv_backward_kernel(
    x, weight, bias, documents, initial, dy, dx, grad_initial, grad_weight, grad_bias,
    num_tokens, num_channels, num_tiles,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of one tile, and its part of the gradients of weight and bias.

    Tiles begin w - 1 positions before the row: what would be dx there is the gradient of
    ``initial``. grad_weight: (B, tiles, w, C), grad_bias: (B, tiles, C), both fp32.
    """
    batch = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S) - (WIDTH - 1)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (channel < num_channels)[None, :]
    own = _document(documents, batch, position, num_tokens, HAS_DOCUMENTS)
    own_value = _load_inputs(
        x, initial, batch, position, channel, num_tokens, num_channels, WIDTH, HAS_INITIAL
    )
    tile = (batch * num_tiles + tl.program_id(0)).to(tl.int64)
    grad_x = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for m in tl.static_range(WIDTH):
        grad = _grad_preactivation(
            x, weight, bias, documents, initial, dy, batch, position + m, channel, num_tokens,
            num_channels, WIDTH, SILU, HAS_BIAS, HAS_DOCUMENTS, HAS_INITIAL,
        )  # fmt: skip
        if HAS_BIAS and m == 0:
            at = grad_bias + tile * num_channels + channel
            tl.store(at, tl.sum(grad, axis=0), mask=channel < num_channels)
        same = _document(documents, batch, position + m, num_tokens, HAS_DOCUMENTS) == own
        grad = tl.where(same[:, None], grad, 0.0)
        tap = _load_tap(weight, channel, num_channels, WIDTH - 1 - m, WIDTH)
        grad_x += grad * tap[None, :]
        at = grad_weight + (tile * WIDTH + (WIDTH - 1 - m)) * num_channels + channel
        tl.store(at, tl.sum(grad * own_value, axis=0), mask=channel < num_channels)
    row = (batch.to(tl.int64) * num_tokens + position) * num_channels
    mask = ((position >= 0) & (position < num_tokens))[:, None] & inside
    tl.store(dx + row[:, None] + channel[None, :], grad_x.to(dx.dtype.element_ty), mask=mask)
    if HAS_INITIAL:
        before = position + (WIDTH - 1)
        row = (batch.to(tl.int64) * (WIDTH - 1) + before) * num_channels
        at = grad_initial + row[:, None] + channel[None, :]
        tl.store(
            at, grad_x.to(grad_initial.dtype.element_ty), mask=(position < 0)[:, None] & inside
        )
