"""What the kernel benchmark runs: shapes, our kernels, and the peers that are installed.

Peers are optional packages; those that cannot be imported are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import trinity_kernels as kernels
from torch import Tensor
from trinity_kernels import reference
from trinity_kernels.tuning import override

PEERS = ("mamba-ssm", "causal-conv1d", "retention", "flash-linear-attention", "flash-attn")
DEVICE = "cuda"
MAX_TOKENS = 128 * 1024
MAX_QUADRATIC_TOKENS = 64 * 1024
"""Quadratic forms of the second order are not timed beyond: minutes for what is known."""

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class Shape(NamedTuple):
    """One setting of a layer, a row of one sample."""

    kernel: str
    num_heads: int
    d: int
    e: int
    num_keys: int
    """Query and key heads; fewer than heads in Mamba-2, channels of a convolution otherwise."""

    def inputs(self, num_tokens: int, dtype: torch.dtype) -> Inputs:
        """Unit-normal q, k, v with decays of about exp(-0.05) per token, or x and its taps."""
        make = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
        if self.kernel == "causal_conv":
            return {"x": make(1, num_tokens, self.num_keys), "weight": make(self.num_keys, self.d)}
        decay = -F.softplus(make(1, num_tokens, self.num_heads).float() - 3.0)
        return {
            "q": make(1, num_tokens, self.num_keys, self.d),
            "k": make(1, num_tokens, self.num_keys, self.d),
            "v": make(1, num_tokens, self.num_heads, self.e),
            "log_decay": decay,
        }


SHAPES = (
    Shape("first_order", 16, 64, 64, 16),
    Shape("first_order", 32, 128, 64, 1),
    Shape("second_order", 16, 64, 64, 16),
    Shape("second_order", 32, 32, 32, 32),
    Shape("forgetting_attention", 16, 64, 64, 16),
    Shape("causal_conv", 0, 4, 0, 3072),
)


SECOND_ORDER_FORMS = (
    ("chunked", 1024, MAX_TOKENS),
    ("quadratic", None, MAX_QUADRATIC_TOKENS),
)


class Candidate(NamedTuple):
    """One implementation; ``is_peer`` if it is not ours, ``exact`` if it computes the same."""

    name: str
    run: Run
    is_peer: bool = True
    exact: bool = True
    max_tokens: int = MAX_TOKENS


def _peer(module: str, name: str) -> Callable[..., Any] | None:
    """A function of an optional package; a broken installation counts as absent."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, RuntimeError, AttributeError):
        return None


def _scale(inputs: Inputs) -> float:
    return inputs["q"].shape[-1] ** -0.5


def _ours(function: Callable[..., Any], **options: Any) -> Run:
    def run(x: Inputs) -> Tensor:
        result = function(x["q"], x["k"], x["v"], x["log_decay"], scale=_scale(x), **options)
        return result[0] if isinstance(result, tuple) else result

    return run


def _second_order(quadratic_below: int | None, x: Inputs) -> Tensor:
    sizes = {} if quadratic_below is None else {"quadratic_below": quadratic_below}
    with override("second_order", **sizes):
        return _ours(kernels.second_order_scan, return_final_state=False)(x)


def as_configured(shape: Shape) -> Candidate:
    """Our kernel as a layer calls it: all sizes from the tuning table, overridden or not."""
    if shape.kernel == "second_order":
        return Candidate("trinity", functools.partial(_second_order, None), is_peer=False)
    return next(candidate for candidate in candidates(shape) if not candidate.is_peer)


def softmax_attention(x: Inputs) -> Tensor:
    """Causal softmax attention, which is what a linear mixer competes with."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _mamba_ssm(scan: Callable[..., Any], x: Inputs) -> Tensor:
    """mamba-ssm ties the decay to the step: A = -1, dt = -log decay, x = v / dt."""
    dt = -x["log_decay"]
    minus_one = torch.full((dt.shape[2],), -1.0, device=dt.device)
    values = (x["v"].float() / dt.unsqueeze(3)).to(x["v"].dtype)
    return scan(values, dt, minus_one, x["k"], x["q"] * _scale(x), chunk_size=256)


def candidates(shape: Shape) -> list[Candidate]:
    """Ours, then every peer that is importable."""
    found: list[Candidate] = []
    if shape.kernel == "first_order":
        found.append(Candidate("trinity", _ours(kernels.first_order_scan), is_peer=False))
        if scan := _peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"):
            found.append(Candidate("mamba-ssm", functools.partial(_mamba_ssm, scan)))
        gla = _peer("fla.ops.simple_gla", "chunk_simple_gla")
        if gla and shape.num_keys == shape.num_heads:
            found.append(Candidate("fla chunk_simple_gla", functools.partial(_gla, gla)))
    elif shape.kernel == "second_order":
        power = _peer("retention", "power_retention")
        for name, chunk, limit in SECOND_ORDER_FORMS:
            # The table's threshold decides on the form.
            run = functools.partial(_second_order, 0 if chunk else MAX_TOKENS)
            found.append(Candidate(f"trinity {name}", run, is_peer=False, max_tokens=limit))
            if power:
                run = functools.partial(_retention, power, chunk)
                found.append(Candidate(f"retention {name}", run, max_tokens=limit))
    elif shape.kernel == "forgetting_attention":
        found.append(Candidate("trinity", _ours(kernels.forgetting_attention), is_peer=False))
        if attend := _peer("fla.ops.forgetting_attn", "parallel_forgetting_attn"):
            found.append(
                Candidate("fla parallel_forgetting_attn", functools.partial(_forget, attend))
            )
    else:
        return _conv_candidates()
    if shape.num_keys == shape.num_heads:
        found.append(Candidate("softmax (torch SDPA)", softmax_attention, exact=False))
    return found


def _gla(scan: Callable[..., Any], x: Inputs) -> Tensor:
    return scan(x["q"], x["k"], x["v"], g=x["log_decay"], scale=_scale(x))[0]


def _forget(attend: Callable[..., Any], x: Inputs) -> Tensor:
    return attend(x["q"], x["k"], x["v"], x["log_decay"], scale=_scale(x))


def _retention(power: Callable[..., Any], chunk: int | None, x: Inputs) -> Tensor:
    return power(x["q"], x["k"], x["v"], x["log_decay"], deg=2, scale=_scale(x), chunk_size=chunk)


def _conv_candidates() -> list[Candidate]:
    conv = _peer("causal_conv1d", "causal_conv1d_fn")

    def ours(x: Inputs) -> Tensor:
        return kernels.causal_conv(x["x"], x["weight"], activation="silu")

    def peer(x: Inputs) -> Tensor:
        assert conv is not None
        return conv(x["x"].mT, x["weight"], activation="silu").mT

    def plain(x: Inputs) -> Tensor:
        num_taps = x["weight"].shape[1]
        padded = F.pad(x["x"].mT, (num_taps - 1, 0))
        return F.silu(F.conv1d(padded, x["weight"].unsqueeze(1), groups=padded.shape[1])).mT

    found = [Candidate("trinity", ours, is_peer=False), Candidate("torch conv1d", plain)]
    return [*found, Candidate("causal-conv1d", peer)] if conv else found


def reference_output(kernel: str, x: Inputs) -> Tensor:
    """The function a kernel computes, in the dtype of its inputs."""
    if kernel == "causal_conv":
        return reference.causal_conv_reference(x["x"], x["weight"], activation="silu")
    arguments = (x["q"], x["k"], x["v"], x["log_decay"])
    if kernel == "forgetting_attention":
        return reference.forgetting_attention_reference(*arguments, scale=_scale(x))
    power = 1 if kernel == "first_order" else 2
    return reference.scan_dense(*arguments, scale=_scale(x), power=power, normalize=power == 2)[0]
