"""diffusers' WanTransformer3DModel as a host of the patch adapter.

The model cuts videos by a strided convolution. A coarse patch of ``s`` times its edge is that same
convolution, stride and all, on a latent whose ``s`` x ``s`` neighbours are moved into channels: so
neither the model's modules nor its configuration change, and only weights of other shapes and the
rotary positions are put in for the time of a call. Coarse patches are as long as the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
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
from trinity.models.patching import patch_centres

TRAIN_TIMESTEPS = 1000
"""The model is told sigma times this."""
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class WanCondition:
    """What a Wan model is told beside latent and noise level."""

    prompt_BSD: Tensor
    """Embedding of the prompt's tokens (``encoder_hidden_states``)."""
    image_BSD: Tensor | None = None
    """Embedding of a picture to start from (``encoder_hidden_states_image``)."""
    attention_kwargs: Mapping[str, Any] | None = None


class WanHost(ModelHost):
    """Runs a WanTransformer3DModel; see :class:`trinity.models.patch_hosts.PatchHost`."""

    def __init__(self, base: nn.Module) -> None:
        """Raises ConfigError for a model of another class, patch shape or rotary base."""
        require_class(base, "WanTransformer3DModel")
        model: Any = base
        config = model.config
        frames, height, width = config.patch_size
        if height != width:
            raise ConfigError(
                f"patch host: patch_size {config.patch_size} of the Wan model: patches must be "
                "square"
            )
        geometry = PatchGeometry(
            patch=height,
            frames=frames,
            in_channels=config.in_channels,
            out_channels=config.out_channels or config.in_channels,
            width=model.patch_embedding.out_channels,
            deembed_layout="channels_last",
        )
        super().__init__(base, geometry)
        cosines, sines = rotary_tables(torch.tensor([[0.0] * 3, [1.0] * 3]), self._rotary_widths())
        known = torch.cat([model.rope.freqs_cos[:2], model.rope.freqs_sin[:2]]).cpu()
        rounding = 2 * torch.finfo(known.dtype).eps
        if not torch.allclose(torch.cat([cosines, sines]), known.float(), atol=rounding + 1e-6):
            raise ConfigError(
                f"patch host: the Wan model's rotary positions do not have base {ROPE_THETA:g}: "
                "positions between its own cannot be worked out"
            )

    def projections(self) -> Projections:
        """The model's own projections."""
        embed, deembed = self._base.patch_embedding, self._base.proj_out
        return Projections(embed.weight.flatten(1), embed.bias, deembed.weight, deembed.bias)

    def feed_forward(self) -> dict[str, nn.Linear]:
        """Feed-forward linears of all blocks."""
        names = [
            f"blocks.{index}.ffn.net.{part}"
            for index in range(len(self._base.blocks))
            for part in ("0.proj", "2")
        ]
        return {name: self._base.get_submodule(name) for name in names}

    def take(self, condition: WanCondition, rows_N: Tensor) -> WanCondition:
        """The condition of some rows."""
        prompt_BSD = rows_of(condition.prompt_BSD, rows_N)
        image_BSD = condition.image_BSD
        image_BSD = None if image_BSD is None else rows_of(image_BSD, rows_N)
        return replace(condition, prompt_BSD=prompt_BSD, image_BSD=image_BSD)

    def velocity(
        self,
        z: Tensor,
        sigma_B: Tensor,
        condition: WanCondition,
        *,
        spacing: int = 1,
        projections: Projections | None = None,
    ) -> Tensor:
        """Velocity of latents (B, C, T, H, W); see :meth:`PatchHost.velocity`.

        Raises ConfigError when the patches do not divide the latent.
        """
        assert z.ndim == 5, z.shape
        fold = spacing if projections is not None else 1
        self._check_extent(z, fold)
        folded = _fold(z.to(self._base.dtype), fold)
        image_BSD, attention_kwargs = condition.image_BSD, condition.attention_kwargs
        arguments = {
            "hidden_states": folded,
            # By way of fp64: what a caller divided by 1000 comes back to the bit.
            "timestep": (sigma_B.double() * TRAIN_TIMESTEPS).to(z.device, torch.float32),
            "encoder_hidden_states": condition.prompt_BSD.to(folded.dtype),
            "encoder_hidden_states_image": None if image_BSD is None else image_BSD.to(folded),
            "attention_kwargs": None if attention_kwargs is None else dict(attention_kwargs),
            "return_dict": False,
        }
        tensors = self._tensors(projections, fold, folded)
        with self._spaced_positions(spacing):
            output = swapped_call(self._base, tensors, arguments)
        return _unfold(output, fold)

    def read_call(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latent, noise level and condition of a call of the model's forward.

        Raises ConfigError for a noise level per token.
        """
        timestep = arguments["timestep"]
        if timestep.ndim != 1:
            raise ConfigError(
                f"dynamic patches: timestep of shape {tuple(timestep.shape)}: a noise level per "
                "token (expand_timesteps) is not supported"
            )
        condition = WanCondition(
            arguments["encoder_hidden_states"],
            arguments.get("encoder_hidden_states_image"),
            arguments.get("attention_kwargs"),
        )
        return ModelCall(
            arguments["hidden_states"], timestep.double().cpu() / TRAIN_TIMESTEPS, condition
        )

    def write_sample(self, velocity: Tensor) -> Tensor:
        """The velocity as it is."""
        return velocity

    def _check_extent(self, z: Tensor, fold: int) -> None:
        edge, frames = self._geometry.patch * fold, self._geometry.frames
        if z.shape[-1] % edge or z.shape[-2] % edge or z.shape[-3] % frames:
            raise ConfigError(
                f"a latent of {tuple(z.shape[-3:])} (frames, rows, columns) is not a whole number "
                f"of {frames} x {edge} x {edge} patches: pad it or leave this patch size out"
            )

    def _tensors(
        self, projections: Projections | None, fold: int, like: Tensor
    ) -> dict[str, Tensor]:
        """Parameters to replace, by their names in the model, for folded latents."""
        if projections is None:
            return {}
        embed_DP, embed_bias_D, deembed_PD, deembed_bias_P = projections
        assert embed_bias_D is not None, "Wan has biases"
        assert deembed_bias_P is not None, "Wan has biases"
        frames, patch = self._geometry.frames, self._geometry.patch
        # D, C, p_t, rows (patch, fold), columns (patch, fold): the inner ones go to the channels.
        cells = embed_DP.unflatten(1, (-1, frames, patch, fold, patch, fold))
        embed = cells.permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3)

        def out_rows(rows: Tensor) -> Tensor:
            cells = rows.unflatten(0, (frames, patch, fold, patch, fold, -1))
            return cells.movedim((0, 1, 3, 5, 2, 4), (0, 1, 2, 3, 4, 5)).flatten(0, 5)

        return {
            "patch_embedding.weight": embed.to(like),
            "patch_embedding.bias": embed_bias_D.to(like),
            "proj_out.weight": out_rows(deembed_PD).to(like),
            "proj_out.bias": out_rows(deembed_bias_P).to(like),
        }

    def _rotary_widths(self) -> tuple[int, int, int]:
        rope = self._base.rope
        return rope.t_dim, rope.h_dim, rope.w_dim

    @contextlib.contextmanager
    def _spaced_positions(self, spacing: int) -> Iterator[None]:
        """While entered, tokens stand at the centres of areas ``spacing`` base tokens wide."""
        if spacing == 1:
            yield
            return

        def replaced(
            rope: Any, inputs: tuple[Tensor, ...], tables: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            num_frames, height, width = inputs[0].shape[-3:]
            p_t, p_h, p_w = rope.patch_size
            centres_NX = patch_centres((num_frames // p_t, height // p_h, width // p_w), spacing)
            cosines, sines = rotary_tables(centres_NX, self._rotary_widths())
            return cosines[None, :, None].to(tables[0]), sines[None, :, None].to(tables[1])

        with self._base.rope.register_forward_hook(replaced):
            yield


def rotary_tables(
    positions_NX: Tensor, widths: tuple[int, ...], theta: float = ROPE_THETA
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, sum(widths)), float32, of positions that may be fractions.

    Axis ``x`` turns its own ``widths[x]`` entries; pair ``i`` by
    ``position * theta**(-2 i / width)``, each value twice in a row.
    """
    angles = []
    for position_N, width in zip(positions_NX.double().unbind(-1), widths, strict=True):
        pairs = torch.arange(0, width, 2, dtype=torch.float64)
        angle = position_N[:, None] * theta ** (-pairs / width)
        angles.append(angle.repeat_interleave(2, dim=1))
    whole = torch.cat(angles, dim=1)
    return whole.cos().float(), whole.sin().float()


def _fold(z: Tensor, fold: int) -> Tensor:
    """(B, C, T, H, W) to (B, C * fold**2, T, H / fold, W / fold), channels (C, row, column)."""
    return z if fold == 1 else F.pixel_unshuffle(z.movedim(2, 1), fold).movedim(1, 2)


def _unfold(z: Tensor, fold: int) -> Tensor:
    """Undo ``_fold``."""
    return z if fold == 1 else F.pixel_shuffle(z.movedim(2, 1), fold).movedim(1, 2)
