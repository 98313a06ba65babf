"""What the patch adapter asks of a diffusion transformer, whoever wrote it.

A host wraps a model that stays as it is. It tells where the model keeps the projections of its
patches and its feed-forward layers, and runs it on a full-resolution latent: as it is, or for the
time of one call with other projections. What the model is conditioned on belongs to the host; all
others hand it through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trinity.core.errors import ConfigError
from trinity.models.patching import PatchLayout


@dataclass(frozen=True)
class PatchGeometry:
    """How a model cuts its latents."""

    patch: int
    """Edge of the model's own patch, in latent pixels."""
    in_channels: int
    """Channels of what the model reads; the first ``out_channels`` are the latent itself."""
    out_channels: int
    """Channels of the velocity."""
    width: int
    """Width of a token."""
    frames: int = 1
    """Frames of one patch; always 1 for images. Coarse patches have as many."""
    embed_layout: PatchLayout = "channels_first"
    deembed_layout: PatchLayout = "channels_first"

    def num_tokens(self, extent: tuple[int, ...], scale: int = 1) -> int:
        """Tokens of a latent of ``extent`` (H, W) or (T, H, W) on patches ``scale`` times as wide.

        Does not look whether the patches divide the latent; ``patchify`` does.
        """
        num_frames, height, width = extent if len(extent) == 3 else (1, *extent)
        edge = self.patch * scale
        return (num_frames // self.frames) * (height // edge) * (width // edge)


class Projections(NamedTuple):
    """From the pixels of a patch to its token, and back; P is the pixels of a patch."""

    embed_DP: Tensor
    embed_bias_D: Tensor | None
    deembed_PD: Tensor
    deembed_bias_P: Tensor | None


class PatchHost(Protocol):
    """A model that can be run at several patch sizes."""

    @property
    def base(self) -> nn.Module:
        """The model. Whoever holds the host leaves its parameters and modules alone."""
        ...

    @property
    def geometry(self) -> PatchGeometry:
        """How the model cuts latents."""
        ...

    def projections(self) -> Projections:
        """The model's own projections, in the layouts of ``geometry``."""
        ...

    def feed_forward(self) -> Mapping[str, nn.Linear]:
        """By name, the linears of the feed-forward layers that image tokens pass."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What tells this model from others that an adapter would not fit; see ``ModelHost``."""
        ...

    def take(self, condition: Any, rows_N: Tensor) -> Any:
        """The condition of some rows of the batch, in that order."""
        ...

    def velocity(
        self,
        z: Tensor,
        sigma_B: Tensor,
        condition: Any,
        *,
        spacing: int = 1,
        projections: Projections | None = None,
    ) -> Tensor:
        """Velocity, (B, out_channels, ...) in the model's dtype, of latents (B, in_channels, ...).

        Differentiable. With neither keyword it is the model itself, to the bit.

        Args:
            z: latents, images (B, C, H, W) or videos (B, C, T, H, W), any floating dtype.
            sigma_B: noise levels, any floating dtype and device.
            condition: as the host wants it.
            spacing: edge of the area a token stands for, in base tokens; sets its position.
            projections: used in place of the model's own, for patches ``spacing`` times as wide.
                Without, patches are the model's own: ``z`` is then a pooled latent.
        """
        ...


class ModelCall(NamedTuple):
    """A call of the model by someone else's sampling loop."""

    z: Tensor
    sigma_B: Tensor
    """float64 on the CPU: the noise level the model was told, exactly."""
    condition: Any


@runtime_checkable
class PipelineHost(PatchHost, Protocol):
    """A host whose model can be replaced inside a sampling loop that knows nothing of patches."""

    def read_call(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latent, noise level and condition in the arguments, by name, of the model's forward.

        Raises ConfigError for arguments that coarse patches cannot serve.
        """
        ...

    def write_sample(self, velocity: Tensor) -> Tensor:
        """A velocity in the shape that the model's own forward returns."""
        ...


class ModelHost:
    """What hosts have in common: the model, and how it cuts latents."""

    def __init__(self, base: nn.Module, geometry: PatchGeometry) -> None:
        self._base: Any = base
        self._geometry = geometry

    @property
    def base(self) -> nn.Module:
        """The model."""
        return self._base

    @property
    def geometry(self) -> PatchGeometry:
        """How the model cuts latents."""
        return self._geometry

    def config_text(self) -> str:
        """The model's configuration, of which ``identity`` is made; here of one from diffusers."""
        config = {k: value for k, value in self._base.config.items() if not k.startswith("_")}
        return json.dumps(config, sort_keys=True, default=str)

    def identity(self) -> dict[str, str]:
        """Class and a digest of the configuration.

        Weights are left out: finetunes of one model share adapters.
        """
        digest = hashlib.sha256(self.config_text().encode()).hexdigest()[:16]
        return {"base_class": type(self._base).__name__, "base_config": digest}


def require_class(base: nn.Module, name: str) -> None:
    """Raise ConfigError unless ``base`` is of the class called ``name``, or of one below it."""
    if name not in {cls.__name__ for cls in type(base).__mro__}:
        raise ConfigError(
            f"patch host: the model is a {type(base).__name__}, not a {name}: "
            "use the host of its class or write one (see PatchHost)"
        )


def rows_of(value: Tensor, rows_N: Tensor) -> Tensor:
    """Some rows of a tensor with one row per sample."""
    return value[rows_N.to(value.device)]


def swapped_call(
    base: nn.Module, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> Tensor:
    """First output of ``base`` with some parameters replaced for this call only.

    The parameters are back even when the call raises. Two threads must not do this at once.
    """
    if not tensors:
        return base(**arguments)[0]
    outputs = torch.func.functional_call(
        base, dict(tensors), (), dict(arguments), tie_weights=False
    )
    return outputs[0]
