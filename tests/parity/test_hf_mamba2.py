"""The Mamba-2 layer and its scan equal those of transformers: outputs, gradients, decoding."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan

from trinity.core.model_config import ModelConfig
from trinity.models.caches import StateCache
from trinity.nn.mamba2 import Mamba2
from trinity.ops.scan import scan

TOLERANCE = 1e-5
"""Of the largest entry of each tensor, in fp32."""
GRADIENT_TOLERANCE = 1e-4
"""The norm divides by what can be small: gradients of either layer are off by 1e-5 to 1e-4 from
those in fp64."""

WIDTH, HEADS, HEAD_DIM, STATE_DIM = 32, 8, 8, 16
INNER = HEADS * HEAD_DIM
VARIANTS = {
    "one group": {},
    "two groups": {"num_groups": 2},
    "a group per head": {"num_groups": HEADS},
    "no bias, two taps": {"conv_bias": False, "conv_width": 2},
}


def _config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_dense_layers": 1,
            "layer_types": ["mamba2"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "route_scale": 1.0,
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "mamba2": {"head_dim": HEAD_DIM, "state_dim": STATE_DIM, **changes},
        }
    )


def _peer_config(config: ModelConfig) -> Mamba2Config:
    own = config.mamba2
    return Mamba2Config(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        state_size=STATE_DIM,
        n_groups=own.num_groups,
        conv_kernel=own.conv_width,
        use_conv_bias=own.conv_bias,
        expand=2,
        num_hidden_layers=1,
        layer_norm_epsilon=config.rms_norm_eps,
        chunk_size=32,
    )


def _pieces(peer: Mamba2Mixer, num_groups: int, *, gradients: bool) -> dict[str, Tensor]:
    """The peer's parameters, or their gradients, cut up and named as ours."""
    shared = num_groups * STATE_DIM

    def tensor(parameter: torch.nn.Parameter) -> Tensor:
        if not gradients:
            return parameter.detach()
        assert parameter.grad is not None
        return parameter.grad

    rows = tensor(peer.in_proj.weight).split([INNER, INNER, shared, shared, HEADS])
    names = ("gate_proj.weight", "v_proj.weight", "k_proj.weight", "q_proj.weight")
    pieces = dict(zip((*names, "rates.dt_weight"), rows, strict=True))
    for name, parameter in peer.conv1d.named_parameters():
        cut = tensor(parameter).flatten(1) if name == "weight" else tensor(parameter)
        parts = cut.split([INNER, shared, shared])
        pieces |= {
            f"{conv}.{name}": x
            for conv, x in zip(("v_conv", "k_conv", "q_conv"), parts, strict=True)
        }
    own_names = {
        "rates.dt_bias": peer.dt_bias,
        "rates.A_log": peer.A_log,
        "skip.weight": peer.D,
        "out_norm.weight": peer.norm.weight,
        "o_proj.weight": peer.out_proj.weight,
    }
    return pieces | {name: tensor(parameter) for name, parameter in own_names.items()}


def _pair(config: ModelConfig) -> tuple[Mamba2, Mamba2Mixer]:
    """Both layers with the same random parameters; none is at a value that hides a mistake."""
    peer = Mamba2Mixer(_peer_config(config), layer_idx=0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layer = Mamba2(config)
    layer.load_state_dict(_pieces(peer, config.mamba2.num_groups, gradients=False))
    return layer, peer


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    difference = (ours.detach() - theirs.detach()).abs().max()
    return float(difference / theirs.detach().abs().max().clamp(min=1e-12))


def test_the_peer_computes_in_plain_pytorch() -> None:
    """transformers hands over to mamba_ssm wherever that can be imported, on a CPU too."""
    for package in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(package) is None, f"pip uninstall {package}"


@pytest.mark.parametrize("num_tokens", [3, 63, 100])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_every_gradient(changes: dict[str, object], num_tokens: int) -> None:
    config = _config(**changes)
    layer, peer = _pair(config)
    ours_BSD = torch.randn(2, num_tokens, WIDTH, requires_grad=True)
    theirs_BSD = ours_BSD.detach().clone().requires_grad_()
    ours, theirs = layer(ours_BSD), peer(theirs_BSD)
    assert _relative(ours, theirs) < TOLERANCE
    sent_BSD = torch.randn(2, num_tokens, WIDTH)
    ours.backward(sent_BSD)
    theirs.backward(sent_BSD)
    assert ours_BSD.grad is not None
    assert theirs_BSD.grad is not None
    assert _relative(ours_BSD.grad, theirs_BSD.grad) < GRADIENT_TOLERANCE
    gradients = _pieces(peer, config.mamba2.num_groups, gradients=True)
    names = {name for name, _ in layer.named_parameters()}
    assert names == gradients.keys()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert gradients[name].abs().max() > 0, name
        assert _relative(parameter.grad, gradients[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_decoding_through_the_caches(changes: dict[str, object]) -> None:
    config = _config(**changes)
    layer, peer = _pair(config)
    peer.eval()
    x_BSD = torch.randn(2, 43, WIDTH)
    cache, peer_cache = StateCache(), DynamicCache(config=_peer_config(config))
    with torch.no_grad():
        for start, stop in ((0, 37), *((t, t + 1) for t in range(37, 43))):
            ours = layer(x_BSD[:, start:stop], cache=cache)
            theirs = peer(x_BSD[:, start:stop], cache_params=peer_cache)
            assert _relative(ours, theirs) < TOLERANCE, start
    peer_state = peer_cache.get_recurrent_state(0, state_idx=0)
    assert cache.state is not None
    assert _relative(cache.state.mT, peer_state) < TOLERANCE


def test_the_comparison_notices_a_wrong_layer() -> None:
    config = _config(num_groups=2)
    layer, peer = _pair(config)
    x_BSD = torch.randn(2, 40, WIDTH)
    theirs = peer(x_BSD)
    for name, parameter in layer.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
            assert _relative(layer(x_BSD), theirs) > 10 * TOLERANCE, name
            parameter.copy_(before)
    assert _relative(layer(x_BSD), theirs) < TOLERANCE


@pytest.mark.parametrize("backend", ["chunked", "quadratic", "recurrent"])
@pytest.mark.parametrize(("num_tokens", "chunk"), [(1, 8), (63, 16), (100, 256)])
def test_scan_is_theirs(num_tokens: int, chunk: int, backend: str) -> None:
    """With an initial state; outputs, the final state and all gradients."""
    shapes = {
        "q": (2, num_tokens, 2, STATE_DIM),
        "k": (2, num_tokens, 2, STATE_DIM),
        "x": (2, num_tokens, HEADS, HEAD_DIM),
        "dt": (2, num_tokens, HEADS),
        "A": (HEADS,),
        "state": (2, HEADS, HEAD_DIM, STATE_DIM),
    }
    leaves = {name: torch.randn(*shape) for name, shape in shapes.items()}
    leaves["dt"], leaves["A"] = leaves["dt"].exp() / 10, -leaves["A"].exp()
    ours = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    theirs = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    out = scan(
        ours["q"],
        ours["k"],
        ours["x"] * ours["dt"].unsqueeze(-1),
        ours["A"] * ours["dt"],
        scale=1.0,
        initial_state=ours["state"].mT,
        backend=backend,
    )
    peer_out, peer_state = mamba2_chunk_scan(
        theirs["x"],
        theirs["dt"],
        theirs["A"],
        theirs["k"],
        theirs["q"],
        chunk,
        initial_states=theirs["state"],
        return_final_states=True,
    )
    assert _relative(out.out_BSHe, peer_out) < TOLERANCE
    assert _relative(out.state.mT, peer_state) < TOLERANCE
    sent, sent_state = torch.randn_like(peer_out), torch.randn_like(peer_state)
    torch.autograd.backward([out.out_BSHe, out.state], [sent, sent_state.mT])
    torch.autograd.backward([peer_out, peer_state], [sent, sent_state])
    for name in leaves:
        grad, peer_grad = ours[name].grad, theirs[name].grad
        assert grad is not None
        assert peer_grad is not None
        assert peer_grad.abs().max() > 0, name
        assert _relative(grad, peer_grad) < TOLERANCE, name
