"""Every mixer, of texts and of images, on several processes: as on one, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tools.ranks import on_ranks
from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import PRESETS, BackboneConfig, ModelConfig
from trinity.models.patching import patch_centres
from trinity.nn.block import Block
from trinity.nn.init import initialize
from trinity.nn.rope import image_rope_tables, rope_tables
from trinity.ops.image_attention import Sight
from trinity.parallel.context import KeyValueHalo, PartOrder, share_rows
from trinity.parallel.tensor import _cut_branch, _Stream

LAYERS = ["sliding_attention", "full_attention", "mamba2", *PRESETS]
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
    "ffn_types": ["none"] * len(LAYERS),
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "route_scale": 1.0,
    "sliding_window": 5,
    "mamba2": {"head_dim": 4, "state_dim": 3, "num_groups": 2},
    "linear": {"head_dim": 4, "num_kv_heads": 2, "qk_norm": True, "norm_groups": 2},
}
TEXT = ModelConfig.model_validate(SHAPE | {"vocab_size": 8})
IMAGE = DiTConfig.model_validate(SHAPE | {"channels": 1, "condition": "none"})
NUM_TOKENS = 36
WHERE = torch.cat((patch_centres((4, 5), 1), patch_centres((4, 4), 2)))[None]


def _ids(packed: bool) -> Tensor | None:
    """Of two rows. Documents end inside parts, at their ends, and span several."""
    if not packed:
        return None
    counts = [[5, 7, 20, 4], [12, 1, 11, 12]]
    return torch.stack(
        [torch.tensor([3, 1, 3, 2]).repeat_interleave(torch.tensor(row)) for row in counts]
    )


def _blocks(config: BackboneConfig) -> nn.ModuleDict:
    blocks = nn.ModuleDict({name: Block(config, i) for i, name in enumerate(LAYERS)})
    initialize(blocks, weight_std=0.4, num_layers=1, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return blocks.double()


def _inputs() -> tuple[Tensor, Tensor]:
    x_BSD, grad_BSD = torch.randn(
        2, 2, NUM_TOKENS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    return x_BSD, grad_BSD


def _mixed(mixer: nn.Module, x_BSD: Tensor, ids_BS: Tensor | None, first: int) -> Tensor:
    """The mixer on tokens ``first`` .. of the rows whose documents are given."""
    here = slice(first, first + x_BSD.shape[1])
    cos_sin = rope_tables(x_BSD.shape[1], 4, 1e4, "cpu", start=first)
    sight = Sight(WHERE, ids_BS, first_query=first, num_queries=x_BSD.shape[1])
    if getattr(mixer, "is_image", False):
        cos_sin = image_rope_tables(WHERE[:, here], 4, 1e4)
    return mixer(x_BSD, cos_sin, ids_BS, sight=sight)


def _alone(config: BackboneConfig, packed: bool) -> dict[str, dict[str, Tensor]]:
    """Outputs and gradients of each mixer in one process."""
    results = {}
    for name, block in _blocks(config).items():
        x_BSD, grad_BSD = _inputs()
        x_BSD.requires_grad_()
        out_BSD = _mixed(block.mixer, x_BSD, _ids(packed), 0)
        out_BSD.backward(grad_BSD)
        gradients = {n: p.grad for n, p in block.mixer.named_parameters()}
        results[name] = {"out": out_BSD.detach(), "x": x_BSD.grad, **gradients}
    return results


def _close(got: Tensor, want: Tensor, what: str) -> None:
    limit = 1e-10 * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got, want, rtol=0, atol=limit, msg=lambda text: f"{what}: {text}")


def _with_parts_of_rows(cases: list[Any]) -> None:
    for config, packed, wanted in cases:
        _with_parts_of_these(config, packed, wanted)
    assert dist.group.WORLD is not None
    _check_halo_of_flipped_rows(dist.group.WORLD)


def _with_parts_of_these(config: BackboneConfig, packed: bool, wanted: Any) -> None:
    blocks, rank, num_ranks = _blocks(config), dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    share_rows(blocks.values(), dist.group.WORLD)
    for name, block in blocks.items():
        x_BSD, grad_BSD = (x.chunk(num_ranks, 1)[rank].clone() for x in _inputs())
        x_BSD.requires_grad_()
        out_BSD = _mixed(block.mixer, x_BSD, _ids(packed), rank * x_BSD.shape[1])
        out_BSD.backward(grad_BSD)
        want = wanted[name]
        _close(out_BSD, want["out"].chunk(num_ranks, 1)[rank], name)
        assert x_BSD.grad is not None
        _close(x_BSD.grad, want["x"].chunk(num_ranks, 1)[rank], f"{name} gradient of x")
        for parameter_name, parameter in block.mixer.named_parameters():
            assert parameter.grad is not None, parameter_name
            dist.all_reduce(parameter.grad)
            _close(parameter.grad, want[parameter_name], f"{name} {parameter_name}")


def _check_halo_of_flipped_rows(group: dist.ProcessGroup) -> None:
    """Of all sizes: local layers, which no scan has, need different ones of different ranks."""
    rank, num_ranks, part = dist.get_rank(), dist.get_world_size(), 4
    row_S = torch.arange(num_ranks * part, dtype=torch.float64)
    own_S, flipped_S = row_S.chunk(num_ranks)[rank].flip(0), row_S.flip(0)
    halo = KeyValueHalo(PartOrder(group, reverse=True))
    for window in (1, 2, 6, 7, 12, None):
        own_BGSd = own_S.view(1, 1, part, 1)
        keys, values, ids_BS = halo(own_BGSd, 2 * own_BGSd, flipped_S[None], window)
        end = (num_ranks - rank) * part
        first = 0 if window is None else max(0, end - part - window + 1)
        assert torch.equal(keys.flatten(), flipped_S[first:end])
        assert torch.equal(values.flatten(), 2 * flipped_S[first:end])
        assert ids_BS is not None
        assert torch.equal(ids_BS[0], flipped_S[first:end])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_rows(num_ranks: int) -> None:
    cases = [(c, packed, _alone(c, packed)) for c in (TEXT, IMAGE) for packed in (False, True)]
    on_ranks(num_ranks, _with_parts_of_rows, cases)


def _with_parts_of_heads(cases: list[Any]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    stream = _Stream(mesh.get_group(), False)
    for config, wanted in cases:
        for name, block in _blocks(config).items():
            _cut_branch(block.mixer, mesh, stream)
            x_BSD, grad_BSD = _inputs()
            x_BSD.requires_grad_()
            out_BSD = _mixed(block.mixer, x_BSD, _ids(packed=True), 0)
            out_BSD.backward(grad_BSD)
            want = wanted[name]
            _close(out_BSD, want["out"], name)
            assert x_BSD.grad is not None
            _close(x_BSD.grad, want["x"], f"{name} gradient of x")
            for parameter_name, parameter in block.mixer.named_parameters():
                assert isinstance(parameter.grad, DTensor), parameter_name
                whole = parameter.grad.full_tensor()
                _close(whole, want[parameter_name], f"{name} {parameter_name}")


def test_parts_of_heads() -> None:
    on_ranks(2, _with_parts_of_heads, [(c, _alone(c, packed=True)) for c in (TEXT, IMAGE)])
