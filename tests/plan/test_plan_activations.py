"""What a block is planned to keep for its backward, against what autograd really saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trinity.nn.conv
from tools.ledger import ROOT
from trinity.core.config import Config
from trinity.core.load_config import load_config
from trinity.core.runtime import autocast
from trinity.models.lm import LanguageModel
from trinity.nn.attention import GatedAttention
from trinity.nn.block import Block
from trinity.nn.feedforward import GroupedExperts
from trinity.nn.rope import rope_tables
from trinity.ops.conv import causal_conv
from trinity.parallel.mesh import Layout
from trinity.plan.activations import saved_bytes
from trinity.plan.case import Case
from trinity.plan.shapes import model_shape


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_saved_bytes_are_those_of_a_real_block(layer: int) -> None:
    """Dense and local, experts and local, experts and global, with the kernels of GPUs.

    On a CPU fused attention keeps keys repeated for every query head: some per cent more. Windows
    are as long as rows, so that fused attention can do them.
    """
    overrides = ["batch.microbatch_rows=2", "model.sliding_window=512"]
    _compare(load_config(ROOT / "configs/tiny.toml", overrides), layer)


@pytest.mark.parametrize("layer", [0, 1, 2], ids=["mamba2s", "2mamba, experts", "mamba2"])
def test_saved_bytes_of_scans(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2Mamba-E is left out: without the kernel of GPUs its attention keeps scores."""
    monkeypatch.setattr(trinity.nn.conv, "causal_conv", _convolution_that_keeps_its_input)
    overrides = ["batch.microbatch_rows=2", "model.layer_pattern=S-2EM-"]
    layers = "model.num_hidden_layers=3"
    config = load_config(ROOT / "configs/hybrid_tiny.toml", [*overrides, layers])
    _compare(config, layer)


def _compare(config: Config, layer: int) -> None:
    model = LanguageModel.initialized(config.model, seed=0)
    block = model.backbone.layers[str(layer)]
    assert isinstance(block, Block)
    _use_kernels_of_gpus(block)
    rows, positions = config.batch.microbatch_rows, config.batch.sequence_length
    x_BSD = torch.randn(rows, positions, config.model.hidden_size, dtype=torch.bfloat16)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rope = rope_tables(positions, config.model.head_dim, 1e4, "cpu")
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(torch.device("cpu"), "bf16"),
    ):
        block(x_BSD.requires_grad_(), rope)
    # Weights, and the casts of them that autocast makes, count as gathered parameters.
    shapes = {frozenset(shape) for shape in _weight_shapes(block.parameters())}
    measured = sum(
        tensor.untyped_storage().nbytes()
        for tensor in saved.values()
        if frozenset(tensor.shape) not in shapes
    )
    shape = model_shape(config.model, config.optim)
    case = Case(config, shape, Layout())
    planned = saved_bytes(case, shape.kinds[shape.kind_of_layer[layer]], "none")
    assert planned == pytest.approx(measured, rel=0.1)


class _Convolution(torch.autograd.Function):
    """As on a GPU: one node that keeps what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return causal_conv(x, weight, bias, **options)


def _convolution_that_keeps_its_input(
    x: Tensor, weight: Tensor, bias: Tensor, **options: Any
) -> Tensor:
    return _Convolution.apply(x, weight, bias, options)


def _use_kernels_of_gpus(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, GroupedExperts):
            module.backend = "grouped_mm"
        elif isinstance(module, GatedAttention):
            module.backend = "sdpa"


def _weight_shapes(parameters: Iterable[Tensor]) -> Iterable[tuple[int, ...]]:
    for parameter in parameters:
        yield tuple(parameter.shape)
        if parameter.ndim == 4:  # gate and up as one product
            yield (parameter.shape[0], 2 * parameter.shape[2], parameter.shape[3])
