"""Mixers over images: against their equations written out, both ways; documents; a text's weights.

The equations are written for documents one at a time, and for the way back with its own indices
instead of flipped rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import PRESETS, ModelConfig
from trinity.models.patching import patch_centres
from trinity.nn.attention import GatedAttention
from trinity.nn.conv import ShortConv
from trinity.nn.init import initialize
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.mamba2 import Mamba2
from trinity.nn.rope import image_rope_tables, rope_tables
from trinity.ops.elementwise import rotary_reference
from trinity.ops.image_attention import Sight

SCANS = ["mamba2", *PRESETS]
ATTENTIONS = ["sliding_attention", "full_attention"]
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "route_scale": 1.0,
    "sliding_window": 3,
    "mamba2": {"head_dim": 8, "state_dim": 6, "num_groups": 2},
    "linear": {"head_dim": 6},
}
STARTS = [0, 1, 7, 19, 25]
"""Of the documents of a packed row, and its end."""


def _config(layer_type: str, **values: Any) -> DiTConfig:
    own = {"layer_types": [layer_type], "channels": 2, "condition": "none"}
    return DiTConfig.model_validate(SHAPE | own | values)


def _text_config(layer_type: str) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | {"layer_types": [layer_type], "vocab_size": 8})


def _mixer(config: DiTConfig | ModelConfig, *, special: bool = False, seed: int = 0) -> Any:
    """Initialised, then moved off the special values of the initialisation unless wanted."""
    layer_type = config.layer_types[0]
    if layer_type == "mamba2":
        mixer = Mamba2(config)
    elif layer_type in PRESETS:
        mixer = LinearMixer(config, layer_type)
    else:
        mixer = GatedAttention(config, layer_type)
    initialize(nn.ModuleDict({"mixer": mixer}), weight_std=0.3, num_layers=1, seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters() if not special else ():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return mixer.double()


def _x(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 24, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def _ids() -> Tensor:
    """Of one row; an id that comes back is another document."""
    counts = [b - a for a, b in itertools.pairwise(STARTS)]
    return torch.tensor([0, 4, 0, 2]).repeat_interleave(torch.tensor(counts))[None]


def _conv(conv: ShortConv | None, x_SC: Tensor, step: int) -> Tensor:
    """Tap by tap; the tap i away reads the token i earlier, or later on the way back."""
    if conv is None:
        return x_SC
    rows = []
    for t in range(len(x_SC)):
        row = torch.zeros_like(x_SC[0]) if conv.bias is None else conv.bias
        for i in range(conv.width):
            if 0 <= t - step * i < len(x_SC):
                row = row + conv.weight[:, conv.width - 1 - i] * x_SC[t - step * i]
        rows.append(row)
    return torch.stack(rows)


def _decays(log_decay_SU: Tensor, step: int) -> Tensor:
    """What is left of token j at token i, (U, S, S); 0 where the way has not come from j to i.

    The decay of a token comes before it. From j to i > j that is the sum over j+1 .. i, on the way
    back, to i < j, the sum over i .. j-1.
    """
    num_tokens = len(log_decay_SU)
    left = torch.zeros(log_decay_SU.shape[1], num_tokens, num_tokens, dtype=torch.float64)
    for i, j in itertools.product(range(num_tokens), repeat=2):
        if step * (i - j) >= 0:
            passed = range(j + 1, i + 1) if step > 0 else range(i, j)
            left[:, i, j] = log_decay_SU[list(passed)].sum(0).exp()
    return left


def _one_way(mixer: Any, way: Any, step: int, x_SD: Tensor) -> Tensor:
    """(S, heads, e), before gate, norm and output projection."""
    is_mamba2 = isinstance(mixer, Mamba2)
    q, k, v = (
        _conv(getattr(way, f"{name}_conv"), getattr(mixer, f"{name}_proj")(x_SD), step)
        for name in "qkv"
    )
    if is_mamba2:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    dim = mixer.state_dim if is_mamba2 else mixer.head_dim
    q, k = (x.unflatten(-1, (-1, dim)) for x in (q, k))
    v = v.unflatten(-1, (-1, mixer.head_dim))
    if getattr(mixer, "q_norm", None) is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    rates = way.rates
    dt = None
    if rates.dt_weight is not None:
        dt = F.softplus(F.linear(x_SD, rates.dt_weight, rates.dt_bias))
    if rates.A_log is not None:
        log_decay = -rates.A_log.exp() * dt
    else:
        log_decay = -F.softplus(F.linear(x_SD, rates.decay_weight, rates.decay_bias))
    taken = v if dt is None else v * dt.unsqueeze(-1)
    heads = max(q.shape[1], v.shape[1])
    q, k, u = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (q, k, taken))
    decay = _decays(log_decay, step).repeat_interleave(heads // v.shape[1], 0)
    scores = q @ k.mT * (1.0 if is_mamba2 else dim**-0.5)
    weights = decay * (
        scores.exp() if getattr(mixer, "is_attention", False) else scores**mixer.power
    )
    out = weights @ u
    if not is_mamba2 and mixer.out_norm is None:
        out = out / weights.sum(-1, keepdim=True)
    out = out.transpose(0, 1)
    return out + way.skip.weight[:, None] * v if is_mamba2 else out


def _by_equations(mixer: Any, x_SD: Tensor) -> Tensor:
    """One document."""
    out = _one_way(mixer, mixer, 1, x_SD)
    out = out + mixer.reverse.scale[:, None] * _one_way(mixer, mixer.reverse, -1, x_SD)
    out = out.flatten(1)
    if isinstance(mixer, Mamba2):
        out = out * F.silu(mixer.gate_proj(x_SD))
    return mixer.o_proj(out if mixer.out_norm is None else mixer.out_norm(out))


def _assert_same(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(2))
    of_got, of_want = (torch.autograd.grad(out, inputs, grad) for out in (got, want))
    for a, b in zip((got, *of_got), (want, *of_want), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-8, atol=1e-9 * max(1.0, b.detach().abs().max().item())
        )


@pytest.mark.parametrize("layer_type", SCANS)
@pytest.mark.parametrize(
    "linear", [{}, {"num_kv_heads": 2, "qk_norm": True, "conv_width": 3}, {"conv_width": 1}]
)
def test_scans_both_ways_follow_their_equations(layer_type: str, linear: dict[str, Any]) -> None:
    mamba2 = SHAPE["mamba2"] | ({"conv_width": 1} if linear.get("conv_width") == 1 else {})
    config = _config(layer_type, linear={"head_dim": 6} | linear, mamba2=mamba2)
    mixer, x = _mixer(config), _x(STARTS[-1])
    want = torch.cat([_by_equations(mixer, x[0, a:b]) for a, b in itertools.pairwise(STARTS)])
    _assert_same(mixer(x, None, _ids())[0], want, [x, *mixer.parameters()])


@pytest.mark.parametrize("layer_type", SCANS)
def test_a_row_without_documents_is_one(layer_type: str) -> None:
    mixer, x = _mixer(_config(layer_type)), _x(11)
    _assert_same(mixer(x)[0], _by_equations(mixer, x[0]), [x, *mixer.parameters()])


def _attention_by_equations(mixer: GatedAttention, x_SD: Tensor, where_SA: Tensor) -> Tensor:
    """One image."""
    q, k, v = (
        getattr(mixer, f"{name}_proj")(x_SD).unflatten(-1, (-1, mixer.head_dim)) for name in "qkv"
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (mixer.q_norm(q), mixer.k_norm(k), v))
    if mixer.rotates:
        tables = image_rope_tables(where_SA[None], mixer.head_dim, 10_000.0)
        q, k = rotary_reference(q, *tables), rotary_reference(k, *tables)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / mixer.head_dim**0.5
    if mixer.window is not None:
        gap_SS = (where_SA[:, None] - where_SA[None]).abs().amax(-1)
        scores = scores.masked_fill(2 * gap_SS >= mixer.window, -torch.inf)
    out_SD = (scores.softmax(-1) @ v)[0].transpose(0, 1).flatten(1)
    return mixer.o_proj(out_SD * torch.sigmoid(mixer.gate_proj(x_SD)))


@pytest.mark.parametrize("rotate_global", [False, True])
@pytest.mark.parametrize("layer_type", ATTENTIONS)
def test_attention_over_images_follows_its_equations(layer_type: str, rotate_global: bool) -> None:
    mixer = _mixer(_config(layer_type, rotate_global=rotate_global))
    assert mixer.rotates == (layer_type == "sliding_attention" or rotate_global)
    images = [patch_centres((2, 3), 2), patch_centres((4, 4), 1), torch.zeros(3, 2)]
    where = torch.cat(images)[None]
    ids = torch.tensor([5] * 6 + [6] * 16 + [7] * 3)[None]
    x = _x(25)
    rope = image_rope_tables(where, mixer.head_dim, 10_000.0)
    got = mixer(x, rope, sight=Sight(where, ids))[0]
    cuts = [0, 6, 22, 25]
    want = torch.cat(
        [
            _attention_by_equations(mixer, x[0, a:b], image)
            for (a, b), image in zip(itertools.pairwise(cuts), images, strict=True)
        ]
    )
    _assert_same(got, want, [x, *mixer.parameters()])


def _run(mixer: Any, x: Tensor, ids: Tensor) -> Tensor:
    where = torch.zeros(1, x.shape[1], 2)  # near enough for every window
    rope = image_rope_tables(where, 8, 10_000.0)
    return mixer(x, rope, ids, sight=Sight(where, ids)).detach()


@pytest.mark.parametrize("layer_type", [*SCANS, *ATTENTIONS])
def test_every_token_of_an_image_tells_all_of_it_and_nobody_else(layer_type: str) -> None:
    mixer, ids, x = _mixer(_config(layer_type)), _ids(), _x(STARTS[-1]).detach()
    before = _run(mixer, x, ids)
    for start, end in itertools.pairwise(STARTS):
        for changed in {start, end - 1}:
            other = x.clone()
            other[0, changed] += 1.0
            # Sums of decays run over the whole row: their rounding may differ.
            moved = ((_run(mixer, other, ids) - before).abs() > 1e-11).any(-1)[0]
            assert moved[start:end].all()
            assert not moved[:start].any()
            assert not moved[end:].any()


@pytest.mark.parametrize("layer_type", [*SCANS, *ATTENTIONS])
def test_weights_of_a_text_give_what_they_gave_there(layer_type: str) -> None:
    text = _mixer(_text_config(layer_type))
    mixer = _mixer(_config(layer_type), special=True, seed=5)
    missing, unexpected = mixer.load_state_dict(text.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("reverse.") for name in missing)
    if layer_type in ATTENTIONS:
        assert missing == []
        return
    x = _x(STARTS[-1])
    assert bool(missing)
    assert torch.equal(mixer(x, None, _ids()), text(x, rope_tables(25, 8, 1e4, "cpu"), _ids()))
    # The way back learns its weight from the first step on.
    mixer(x, None, _ids()).square().sum().backward()
    assert mixer.reverse.scale.grad.all()


def test_new_parameters_start_as_said() -> None:
    model = nn.ModuleDict(
        {
            "mixer": Mamba2(_config("mamba2")),
            "condition": nn.ModuleDict({"adaln_out": nn.Linear(3, 4), "time_in": nn.Linear(3, 4)}),
            "deembed": nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 8)]),
            "embed": nn.ModuleList([nn.Linear(3, 2)]),
            "own": nn.ParameterDict(
                {name: nn.Parameter(torch.empty(2, 5)) for name in ("modulation", "time_weight")}
            ),
            "scale": nn.ParameterDict({"scale": nn.Parameter(torch.empty(5))}),
        }
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialize(model, weight_std=0.1, num_layers=2, seed=0)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    zero = {name for name, value in values.items() if not value.any()}
    assert zero == {
        "mixer.reverse.scale",
        *(f"condition.adaln_out.{kind}" for kind in ("weight", "bias")),
        *(f"deembed.{number}.{kind}" for number in (0, 1) for kind in ("weight", "bias")),
        "condition.time_in.bias",
        "embed.0.bias",
        "own.modulation",
        "own.time_weight",
    }
    assert all(value.isfinite().all() for value in values.values())
    assert not torch.equal(values["mixer.reverse.q_conv.bias"], values["mixer.q_conv.bias"])
    assert torch.equal(values["mixer.reverse.skip.weight"], torch.ones(6))
