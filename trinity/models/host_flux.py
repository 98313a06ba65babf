"""diffusers' FluxTransformer2DModel as a host of the patch adapter.

Its pipelines pack 2 x 2 pixels of the latent into the channels of a token, so a coarse patch is
packed the same way, wider; positions are numbers that the caller passes and may be fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trinity.core.errors import ConfigError
from trinity.models.patch_hosts import (
    ModelCall,
    ModelHost,
    PatchGeometry,
    Projections,
    require_class,
    rows_of,
    swapped_call,
)
from trinity.models.patching import patch_centres, patchify, unpatchify

PACKED_EDGE = 2
"""Edge, in latent pixels, of what Flux pipelines pack into a token."""


@dataclass(frozen=True)
class FluxCondition:
    """What a Flux model is told beside latent and noise level."""

    prompt_BSD: Tensor
    """Embedding of the prompt's tokens (``encoder_hidden_states``)."""
    pooled_BD: Tensor
    """Embedding of the whole prompt (``pooled_projections``)."""
    guidance_B: Tensor | None = None
    """Guidance scale, for models that were distilled from guided ones."""
    attention_kwargs: Mapping[str, Any] | None = None
    """``joint_attention_kwargs``; only ``scale`` may be given when rows run apart."""


class FluxHost(ModelHost):
    """Runs a FluxTransformer2DModel; see :class:`trinity.models.patch_hosts.PatchHost`."""

    def __init__(self, base: nn.Module) -> None:
        """Raises ConfigError for a model of another class, or one that reads more than latents."""
        require_class(base, "FluxTransformer2DModel")
        model: Any = base
        config = model.config
        packed = config.in_channels
        if config.patch_size != 1 or model.out_channels != packed or packed % PACKED_EDGE**2:
            raise ConfigError(
                f"patch host: Flux model with patch_size {config.patch_size}, in_channels {packed},"
                f" out_channels {model.out_channels}: only models that read and write packed "
                "latents alone are known (no fill, depth or canny)"
            )
        geometry = PatchGeometry(
            patch=PACKED_EDGE,
            in_channels=packed // PACKED_EDGE**2,
            out_channels=packed // PACKED_EDGE**2,
            width=model.x_embedder.out_features,
        )
        super().__init__(base, geometry)

    def projections(self) -> Projections:
        """The model's own projections."""
        embed, deembed = self._base.x_embedder, self._base.proj_out
        return Projections(embed.weight, embed.bias, deembed.weight, deembed.bias)

    def feed_forward(self) -> dict[str, nn.Linear]:
        """Feed-forward linears of the image tokens.

        In the single-stream blocks, whose output projection serves attention too, text tokens pass
        them as well.
        """
        names = [
            f"transformer_blocks.{index}.ff.net.{part}"
            for index in range(len(self._base.transformer_blocks))
            for part in ("0.proj", "2")
        ]
        names += [
            f"single_transformer_blocks.{index}.{part}"
            for index in range(len(self._base.single_transformer_blocks))
            for part in ("proj_mlp", "proj_out")
        ]
        return {name: self._base.get_submodule(name) for name in names}

    def take(self, condition: FluxCondition, rows_N: Tensor) -> FluxCondition:
        """The condition of some rows.

        Raises ConfigError when there are attention arguments that may have a row per sample.
        """
        per_row = set(condition.attention_kwargs or {}) - {"scale"}
        if per_row and len(rows_N) < len(condition.prompt_BSD):
            raise ConfigError(
                f"dynamic patches: joint_attention_kwargs {sorted(per_row)} cannot be split where "
                "the rows of a batch differ in size: sample one row at a time"
            )
        guidance_B = condition.guidance_B
        return replace(
            condition,
            prompt_BSD=rows_of(condition.prompt_BSD, rows_N),
            pooled_BD=rows_of(condition.pooled_BD, rows_N),
            guidance_B=None if guidance_B is None else rows_of(guidance_B, rows_N),
        )

    def velocity(
        self,
        z: Tensor,
        sigma_B: Tensor,
        condition: FluxCondition,
        *,
        spacing: int = 1,
        projections: Projections | None = None,
    ) -> Tensor:
        """Velocity of latents (B, C, H, W); see :meth:`PatchHost.velocity`."""
        assert z.ndim == 4, z.shape
        size = PACKED_EDGE * (spacing if projections is not None else 1)
        tokens_BNP = patchify(z.to(self._base.dtype), size)
        centres_NX = patch_centres((z.shape[-2] // size, z.shape[-1] // size), spacing)
        attention_kwargs = condition.attention_kwargs
        arguments = {
            "hidden_states": tokens_BNP,
            "timestep": sigma_B.to(z.device, tokens_BNP.dtype),
            "encoder_hidden_states": condition.prompt_BSD.to(tokens_BNP.dtype),
            "pooled_projections": condition.pooled_BD.to(tokens_BNP.dtype),
            "guidance": condition.guidance_B,
            "img_ids": nn.functional.pad(centres_NX, (1, 0)).to(z.device),
            "txt_ids": torch.zeros(condition.prompt_BSD.shape[1], 3, device=z.device),
            # A copy: the model takes entries out.
            "joint_attention_kwargs": None if attention_kwargs is None else dict(attention_kwargs),
            "return_dict": False,
        }
        output_BNP = swapped_call(self._base, _tensors(projections, tokens_BNP), arguments)
        return unpatchify(output_BNP, tuple(z.shape[-2:]), size)

    def read_call(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latent, noise level and condition of a call of the model's forward.

        Raises ConfigError for control nets, and for tokens that are not one whole image.
        """
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if arguments.get(name) is not None:
                raise ConfigError(
                    f"dynamic patches: {name} is given, but a control net speaks to tokens of the "
                    "base size: sample without it"
                )
        tokens_BNP, ids_NX = arguments["hidden_states"], arguments["img_ids"]
        ids_NX = ids_NX[0] if ids_NX.ndim == 3 else ids_NX
        rows, columns = (int(edge) + 1 for edge in ids_NX[:, 1:].amax(dim=0).tolist())
        grid_NX = nn.functional.pad(patch_centres((rows, columns), 1), (1, 0)).to(ids_NX)
        text_ids = arguments["txt_ids"]
        if not torch.equal(ids_NX, grid_NX) or bool(text_ids.any()):
            raise ConfigError(
                f"dynamic patches: {len(ids_NX)} tokens at img_ids that are not the grid of one "
                "image (or txt_ids that are not 0): editing models, which add tokens of a "
                "reference image, are not supported"
            )
        extent = (rows * PACKED_EDGE, columns * PACKED_EDGE)
        condition = FluxCondition(
            arguments["encoder_hidden_states"],
            arguments["pooled_projections"],
            arguments.get("guidance"),
            arguments.get("joint_attention_kwargs"),
        )
        sigma_B = arguments["timestep"].double().cpu()
        return ModelCall(unpatchify(tokens_BNP, extent, PACKED_EDGE), sigma_B, condition)

    def write_sample(self, velocity: Tensor) -> Tensor:
        """A velocity (B, C, H, W) packed into tokens (B, N, P)."""
        return patchify(velocity, PACKED_EDGE)


def _tensors(projections: Projections | None, like: Tensor) -> dict[str, Tensor]:
    """Parameters to replace, by their names in the model."""
    if projections is None:
        return {}
    embed_DP, embed_bias_D, deembed_PD, deembed_bias_P = projections
    assert embed_bias_D is not None, "Flux has biases"
    assert deembed_bias_P is not None, "Flux has biases"
    return {
        "x_embedder.weight": embed_DP.to(like),
        "x_embedder.bias": embed_bias_D.to(like),
        "proj_out.weight": deembed_PD.to(like),
        "proj_out.bias": deembed_bias_P.to(like),
    }
