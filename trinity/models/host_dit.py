"""Our own diffusion transformer as a host of coarse patches it was not trained for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trinity.models.dit import DiffusionTransformer
from trinity.models.patch_hosts import ModelHost, PatchGeometry, Projections, rows_of
from trinity.nn.feedforward import SwiGLU


class DiTHost(ModelHost):
    """Runs a :class:`DiffusionTransformer`; see :class:`trinity.models.patch_hosts.PatchHost`.

    The condition is a tensor with a row per sample: classes (B,), or embeddings (B, W).
    Feed-forward layers are the dense ones and the shared experts; routed experts stay as they are.
    """

    def __init__(self, base: DiffusionTransformer) -> None:
        config = base.config
        geometry = PatchGeometry(
            patch=config.patch_size,
            in_channels=config.channels,
            out_channels=config.channels,
            width=config.hidden_size,
            frames=config.patch_frames,
        )
        super().__init__(base, geometry)

    def projections(self) -> Projections:
        """The model's own projections of the base patch."""
        embed = self._base.get_submodule("patch_embed.embed.0")
        deembed = self._base.get_submodule("patch_head.deembed.0")
        assert isinstance(embed, nn.Linear)
        assert isinstance(deembed, nn.Linear)
        return Projections(embed.weight, embed.bias, deembed.weight, deembed.bias)

    def feed_forward(self) -> dict[str, nn.Linear]:
        """The linears of dense feed-forwards and shared experts, by name."""
        return {
            f"{name}.{part}": linear
            for name, module in self._base.named_modules()
            if isinstance(module, SwiGLU)
            for part, linear in module.named_children()
            if isinstance(linear, nn.Linear)
        }

    def config_text(self) -> str:
        """The model's configuration."""
        return self._base.config.model_dump_json()

    def take(self, condition: Tensor, rows_N: Tensor) -> Tensor:
        """The condition of some rows."""
        return rows_of(condition, rows_N)

    def velocity(
        self,
        z: Tensor,
        sigma_B: Tensor,
        condition: Tensor,
        *,
        spacing: int = 1,
        projections: Projections | None = None,
    ) -> Tensor:
        """Velocity of latents; see :meth:`PatchHost.velocity`."""
        dtype = next(self._base.parameters()).dtype
        edge = self._geometry.patch * (spacing if projections is not None else 1)
        arguments = (z.to(dtype), sigma_B.to(z.device, torch.float32), condition)
        keywords = {"edge": edge, "spacing": spacing}
        if projections is None:
            return self._base(*arguments, **keywords)
        embed_DP, embed_bias_D, deembed_PD, deembed_bias_P = projections
        replaced = {
            "patch_embed.embed.0.weight": embed_DP,
            "patch_embed.embed.0.bias": embed_bias_D,
            "patch_head.deembed.0.weight": deembed_PD,
            "patch_head.deembed.0.bias": deembed_bias_P,
        }
        tensors = {name: t.to(dtype) for name, t in replaced.items() if t is not None}
        return torch.func.functional_call(
            self._base, tensors, arguments, keywords, tie_weights=False
        )
