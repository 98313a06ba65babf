"""What a step of FLUX.1-dev costs at each patch size: its real shapes, random weights.

The model is built on the GPU in bf16 (12 billion parameters, 24 GB) and run under a patch adapter
on the latent of a 1024 x 1024 image with 512 text tokens. No weights are needed: time does not
depend on them. A first check holds the adapter at size 1 to the bare model, bit for bit.

    python -m tools.bench.flux_shapes                       # needs a GPU and the extra `diffusers`
    python -m tools.bench.flux_shapes --tiny --device cpu   # the same code on a small model
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trinity.core.runtime import Moment
from trinity.models.host_flux import FluxCondition, FluxHost
from trinity.models.patch_adapter import PatchAdapter

FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY = FLUX_DEV | {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}
NUM_TEXT = 512
LATENT_EDGE = 128
SCALES = (1, 2, 4)
MIXES = {"72 % of the steps at 4": (0.28, 0.0, 0.72), "81 % of the steps at 2": (0.19, 0.81, 0.0)}
"""Shares of the steps at each size that the published speed-up of 2.18 comes to."""


def build(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A FluxTransformer2DModel with random weights, made where it runs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def inputs(
    config: dict[str, Any], edge: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, FluxCondition]:
    """Latent, noise level and condition of one image."""
    z = torch.randn(1, config["in_channels"] // 4, edge, edge, device=device)
    condition = FluxCondition(
        torch.randn(1, NUM_TEXT, config["joint_attention_dim"], device=device, dtype=dtype),
        torch.randn(1, config["pooled_projection_dim"], device=device, dtype=dtype),
        torch.full((1,), 3.5, device=device),
    )
    return z, torch.full((1,), 0.8), condition


@torch.inference_mode()
def measure(
    *, tiny: bool = False, device: str = "cuda", rounds: int = 5, warm_up: int = 2
) -> dict[str, Any]:
    """Milliseconds of a step at each size, median of ``rounds``, and the ratios to size 1."""
    where, dtype = torch.device(device), torch.bfloat16
    config, edge = (TINY, 32) if tiny else (FLUX_DEV, LATENT_EDGE)
    base = build(config, where, dtype)
    adapter = PatchAdapter(FluxHost(base), SCALES)
    z, sigma_B, condition = inputs(config, edge, where, dtype)
    bare = adapter.host.velocity(z, sigma_B, condition)
    if not torch.equal(adapter(z, sigma_B, condition, 1), bare):
        raise AssertionError("at size 1 the adapter is not the model")
    steps_ms = {}
    for scale in SCALES:
        times_ms = []
        for number in range(warm_up + rounds):
            start = Moment(where)
            adapter(z, sigma_B, condition, scale)
            end = Moment(where)
            end.wait()
            if number >= warm_up:
                times_ms.append(end.seconds_since(start) * 1e3)
        steps_ms[scale] = statistics.median(times_ms)
    fine = steps_ms[1]
    mixes = {
        name: fine / sum(part * steps_ms[s] for part, s in zip(shares, SCALES, strict=True))
        for name, shares in MIXES.items()
    }
    return {
        "model": "tiny" if tiny else "FLUX.1-dev shapes, random weights",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens": {scale: (edge // (2 * scale)) ** 2 for scale in SCALES},
        "text_tokens": NUM_TEXT,
        "step_ms": steps_ms,
        "speed_up": {scale: fine / ms for scale, ms in steps_ms.items()},
        "speed_up_of_a_run": mixes,
    }


def main() -> None:
    """Print the numbers; write them where asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(tiny=options.tiny, device=options.device, rounds=options.rounds)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
