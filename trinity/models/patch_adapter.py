"""Gives a frozen diffusion transformer larger patches: fewer tokens where a step allows it.

Per coarse scale ``s`` (patches ``s`` times as wide, ``s**2`` times fewer tokens) the adapter owns
projections in and out, a vector that tells the size, low-rank additions to the feed-forward layers,
and a path around the transformer at full resolution ("DDiT", 2026):

    v = deembed(blocks(embed(z) + size)) + residual(z, sigma).

A coarse token cannot carry the noise of every pixel, and the velocity holds all of it: the residual
path carries that, and most of the gain. The model itself is never changed; scale 1 is the model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trinity.core.errors import CheckpointError, ConfigError
from trinity.models.patch_hosts import PatchHost, Projections
from trinity.models.patching import PatchInit, resize_deembed, resize_embed

FILE_FORMAT = "trinity-patch-adapter-1"


class ResidualPath(nn.Module):
    """Velocity at full resolution from the latent and the noise level: two 3x3 convolutions.

    The noise level is one more channel; frames of a video pass one by one. Starts as zero by its
    last layer alone: were both zero, neither would ever receive a gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, sigma_B: Tensor) -> Tensor:
        """Velocity (B, out_channels, ...) of latents (B, C, H, W) or (B, C, T, H, W)."""
        frames = z if z.ndim == 4 else z.movedim(2, 1).flatten(0, 1)
        frames = frames.to(self.conv_in.weight.dtype)
        sigma = sigma_B.to(frames).repeat_interleave(frames.shape[0] // z.shape[0])
        plane = sigma.view(-1, 1, 1, 1).expand(-1, 1, *frames.shape[-2:])
        out = self.conv_out(F.silu(self.conv_in(torch.cat([frames, plane], dim=1))))
        return out if z.ndim == 4 else out.unflatten(0, (z.shape[0], -1)).movedim(1, 2)


class LowRank(nn.Module):
    """Low-rank addition to the output of a linear (LoRA), as a forward hook. Starts as zero."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down_RN = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.up_MR = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The linear's output with the addition, in its dtype."""
        x = inputs[0]
        return output + F.linear(F.linear(x, self.down_RN.to(x.dtype)), self.up_MR.to(x.dtype))


class CoarseParts(nn.Module):
    """All that one coarse scale owns."""

    def __init__(
        self, host: PatchHost, scale: int, *, init: PatchInit, lora_rank: int, residual_width: int
    ) -> None:
        super().__init__()
        geometry, own = host.geometry, host.projections()
        size = geometry.patch * scale
        embed_DP = resize_embed(
            own.embed_DP.detach(),
            geometry.patch,
            size,
            frames=geometry.frames,
            layout=geometry.embed_layout,
            init=init,
        )
        deembed_PD, deembed_bias_P = resize_deembed(
            own.deembed_PD.detach(),
            None if own.deembed_bias_P is None else own.deembed_bias_P.detach(),
            geometry.patch,
            size,
            frames=geometry.frames,
            layout=geometry.deembed_layout,
            init=init,
        )
        if own.embed_bias_D is None:
            embed_bias_D = embed_DP.new_zeros(geometry.width)
        else:
            embed_bias_D = own.embed_bias_D.detach().clone()
        if deembed_bias_P is None:
            deembed_bias_P = deembed_PD.new_zeros(len(deembed_PD))
        # fp32 also beside a model in half precision: a step of 1e-4 would be rounded away.
        exact = torch.promote_types(embed_DP.dtype, torch.float32)
        self.embed_DP = nn.Parameter(embed_DP.to(exact))
        self.embed_bias_D = nn.Parameter(embed_bias_D.to(exact))
        self.deembed_PD = nn.Parameter(deembed_PD.to(exact))
        self.deembed_bias_P = nn.Parameter(deembed_bias_P.to(exact))
        self.size_D = nn.Parameter(torch.zeros_like(self.embed_bias_D))
        self.residual: ResidualPath | None = None
        if residual_width:
            self.residual = ResidualPath(
                geometry.in_channels, geometry.out_channels, residual_width
            ).to(embed_DP.device, exact)
        linears = host.feed_forward() if lora_rank else {}
        self.lora = nn.ModuleDict(
            {
                # Names of submodules must not hold dots.
                name.replace(".", "/"): LowRank(linear.in_features, linear.out_features, lora_rank)
                for name, linear in linears.items()
            }
        ).to(embed_DP.device, exact)

    def projections(self) -> Projections:
        """What to put in place of the model's own; the size vector is part of the bias."""
        return Projections(
            self.embed_DP, self.embed_bias_D + self.size_D, self.deembed_PD, self.deembed_bias_P
        )

    def low_rank(self) -> Iterator[tuple[str, LowRank]]:
        """The additions by the names of the host's linears."""
        for name, addition in self.lora.items():
            assert isinstance(addition, LowRank)
            yield name.replace("/", "."), addition


class PatchAdapter(nn.Module):
    """The coarse scales of a host; scale 1 is the host's model itself, to the bit.

    Its state holds the adapter alone. Not for several threads at once: while a coarse call runs,
    the model has hooks and other projections.
    """

    def __init__(
        self,
        host: PatchHost,
        scales: tuple[int, ...] = (1, 2, 4),
        *,
        lora_rank: int = 32,
        residual_width: int = 32,
        init: PatchInit = "pseudo_inverse",
        seed: int = 0,
    ) -> None:
        """Raises ConfigError for scales that do not rise from 1, or negative widths.

        Args:
            host: the model; neither copied nor registered here.
            scales: patch sizes in units of the model's own, rising, the first one 1.
            lora_rank: of the additions to feed-forward layers; 0 for none.
            residual_width: channels inside the residual path; 0 for no path.
            init: how the model's projections become those of larger patches.
            seed: of the first random weights.
        """
        super().__init__()
        if scales[:1] != (1,) or list(scales) != sorted(set(scales)) or len(scales) < 2:
            raise ConfigError(
                f"patch adapter: scales = {scales}: begin with 1 and list larger ones, rising"
            )
        if lora_rank < 0 or residual_width < 0:
            raise ConfigError(
                f"patch adapter: lora_rank = {lora_rank}, residual_width = {residual_width}: "
                "use 0 (none) or more"
            )
        self.host = host
        self.scales = tuple(scales)
        self.lora_rank, self.residual_width = lora_rank, residual_width
        self._attached_scale: int | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.parts = nn.ModuleDict(
                {
                    str(scale): CoarseParts(
                        host, scale, init=init, lora_rank=lora_rank, residual_width=residual_width
                    )
                    for scale in scales[1:]
                }
            )

    def part(self, scale: int) -> CoarseParts:
        """The parameters of a coarse scale. Raises ConfigError for a scale it does not have."""
        if scale not in self.scales[1:]:
            raise ConfigError(
                f"patch adapter: scale {scale} is not one of {self.scales}: "
                "make the adapter with this scale, or leave it out of the scheduler's sizes"
            )
        part = self.parts[str(scale)]
        assert isinstance(part, CoarseParts)
        return part

    def forward(self, z: Tensor, sigma_B: Tensor, condition: Any, scale: int) -> Tensor:
        """Velocity (B, out_channels, ...) in the model's dtype, as :meth:`PatchHost.velocity`.

        Raises ConfigError for a scale it does not have, and for one whose patches do not divide
        the latent.
        """
        if scale == 1:
            return self.host.velocity(z, sigma_B, condition)
        part = self.part(scale)
        self._refuse_lost_recomputation(scale)
        with self.attached(scale):
            velocity = self.host.velocity(
                z, sigma_B, condition, spacing=scale, projections=part.projections()
            )
        if part.residual is None:
            return velocity
        return velocity + part.residual(z, sigma_B).to(velocity.dtype)

    @contextlib.contextmanager
    def attached(self, scale: int) -> Iterator[None]:
        """While entered, the model's feed-forward layers have the additions of ``scale``.

        ``forward`` enters it by itself. Enter it around forward and backward when the model
        recomputes activations, which would otherwise miss the additions.
        """
        if self._attached_scale == scale:
            yield
            return
        assert self._attached_scale is None, "one scale at a time"
        linears = self.host.feed_forward()
        with contextlib.ExitStack() as stack:
            for name, addition in self.part(scale).low_rank():
                stack.enter_context(linears[name].register_forward_hook(addition))
            self._attached_scale = scale
            try:
                yield
            finally:
                self._attached_scale = None

    def _refuse_lost_recomputation(self, scale: int) -> None:
        recomputes = getattr(self.host.base, "gradient_checkpointing", False)
        if recomputes and torch.is_grad_enabled() and self._attached_scale != scale:
            raise ConfigError(
                "patch adapter: the model has gradient checkpointing, and its backward pass would "
                f"recompute without the adapter: run forward and backward inside attached({scale})"
            )

    def save(self, path: str | Path) -> None:
        """Write the adapter's weights as safetensors, with what tells the model it belongs to."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, temporary, metadata=self.metadata())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, host: PatchHost) -> Self:
        """The adapter in ``path``, for ``host``.

        Raises CheckpointError when the file is missing, damaged, no adapter, or one of another
        model.
        """
        metadata, weights = read_adapter_file(path)
        for key, value in host.identity().items():
            if metadata.get(key) != value:
                raise CheckpointError(
                    f"patch adapter {path}: it was made for {key} {metadata.get(key)!r}, the "
                    f"model has {value!r}: load it with the model it was made for"
                )
        adapter = cls(
            host,
            tuple(int(scale) for scale in metadata["scales"].split(",")),
            lora_rank=int(metadata["lora_rank"]),
            residual_width=int(metadata["residual_width"]),
        )
        adapter.load_weights(weights, source=str(path))
        return adapter

    def load_weights(self, weights: Mapping[str, Tensor], *, source: str) -> None:
        """Take over saved weights; CheckpointError naming ``source`` when they do not fit."""
        own = self.state_dict()
        wrong = sorted(
            name
            for name in own.keys() | weights.keys()
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        )
        if wrong:
            raise CheckpointError(
                f"patch adapter {source}: {len(wrong)} weights are missing, unknown or of another "
                f"shape, {wrong[0]} first: the host does not name or shape its layers as it did"
            )
        self.load_state_dict(dict(weights))

    def metadata(self) -> dict[str, str]:
        """What a file of this adapter says beside the weights."""
        return {
            "format": FILE_FORMAT,
            "scales": ",".join(map(str, self.scales)),
            "lora_rank": str(self.lora_rank),
            "residual_width": str(self.residual_width),
            **self.host.identity(),
        }


def read_adapter_file(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of adapter weights. CheckpointError when it is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"patch adapter {path}: {error}: pass a saved adapter") from error
    if metadata.get("format") != FILE_FORMAT:
        raise CheckpointError(
            f"patch adapter {path}: format {metadata.get('format')!r} is not {FILE_FORMAT!r}: "
            "pass a file that PatchAdapter.save wrote"
        )
    return metadata, weights
