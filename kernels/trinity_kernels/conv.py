"""Depthwise causal convolution with its gradient. Kept for the backward: the inputs alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trinity_kernels import conv_triton as tiles
from trinity_kernels.layout import launch, num_tiles, on_device_of


class ConvOptions(NamedTuple):
    """What is not a tensor."""

    silu: bool
    block_tokens: int
    block_channels: int
    num_warps: int


class CausalConv(torch.autograd.Function):
    """Inputs contiguous and checked; see ``trinity_kernels.causal_conv``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        weight_Cw: Tensor,
        bias_C: Tensor | None,
        initial_BwC: Tensor | None,
        documents: Tensor | None,
        options: ConvOptions,
    ) -> Tensor:
        batch, num_tokens, num_channels = x_BSC.shape
        y_BSC = torch.empty_like(x_BSC)
        grid = (
            num_tiles(num_tokens, options.block_tokens),
            num_tiles(num_channels, options.block_channels),
            batch,
        )
        with on_device_of(x_BSC):
            launch(
                tiles.conv_forward_kernel, grid,
                x_BSC, weight_Cw, *_given(x_BSC, bias_C, documents, initial_BwC), y_BSC,
                num_tokens, num_channels, weight_Cw.shape[1], options.silu, bias_C is not None,
                documents is not None, initial_BwC is not None, options.block_tokens,
                options.block_channels, num_warps=options.num_warps,
            )  # fmt: skip
        ctx.save_for_backward(x_BSC, weight_Cw, bias_C, initial_BwC, documents)
        ctx.options = options
        return y_BSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSC: Tensor) -> tuple[Tensor | None, ...]:
        x_BSC, weight_Cw, bias_C, initial_BwC, documents = ctx.saved_tensors
        options: ConvOptions = ctx.options
        batch, num_tokens, num_channels = x_BSC.shape
        width = weight_Cw.shape[1]
        tiles_per_row = num_tiles(num_tokens + width - 1, options.block_tokens)
        grid = (tiles_per_row, num_tiles(num_channels, options.block_channels), batch)
        grad_x = torch.empty_like(x_BSC)
        grad_initial = None if initial_BwC is None else torch.empty_like(initial_BwC)
        fp32 = {"dtype": torch.float32}
        weight_parts = x_BSC.new_empty(batch, tiles_per_row, width, num_channels, **fp32)
        bias_parts = x_BSC.new_empty(batch, tiles_per_row, num_channels, **fp32)
        with on_device_of(x_BSC):
            launch(
                tiles.conv_backward_kernel, grid,
                x_BSC, weight_Cw, *_given(x_BSC, bias_C, documents, initial_BwC),
                grad_BSC.contiguous(), grad_x, grad_x if grad_initial is None else grad_initial,
                weight_parts, bias_parts, num_tokens, num_channels, tiles_per_row, width,
                options.silu, bias_C is not None, documents is not None, initial_BwC is not None,
                options.block_tokens, options.block_channels, num_warps=options.num_warps,
            )  # fmt: skip
        grad_weight = weight_parts.sum((0, 1)).mT.to(weight_Cw.dtype)
        grad_bias = None if bias_C is None else bias_parts.sum((0, 1)).to(bias_C.dtype)
        return grad_x, grad_weight, grad_bias, grad_initial, None, None


def _given(stand_in: Tensor, *optional: Tensor | None) -> list[Tensor]:
    """A pointer must point somewhere, also where a flag says it is not read."""
    return [stand_in if tensor is None else tensor for tensor in optional]
