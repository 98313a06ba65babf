"""Patches of one latent at several sizes: cutting, new projections, coordinates, coarse velocities.

A diffusion transformer with base patch ``p`` can run a step on patches of ``q = s p`` with ``s**2``
times fewer tokens. This module holds what that needs and no network: the cut itself, first weights
for the larger patch (Beyer et al., "FlexiViT", 2023), where coarse tokens stand, and two
ways to get a full-resolution velocity out of a coarse prediction without training.

Latents are images (B, C, H, W) or videos (B, C, T, H, W). Flow: ``z = (1 - sigma) x0 + sigma eps``
with velocity ``v = eps - x0``; ``sigma`` falls from 1 to 0 while sampling.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError

PatchLayout = Literal["channels_first", "channels_last"]
"""Order inside one token: (C, p_t, p_h, p_w), as a flattened convolution kernel and as FLUX packs
it, or (p_t, p_h, p_w, C), as Wan's output projection writes it."""

PatchInit = Literal["pseudo_inverse", "sub_patch_average"]
Upsampling = Literal["bilinear", "nearest"]

MIN_NOISE_PATH_SIGMA = 0.5
"""Below it the analytic noise path loses to the coarse prediction: errors are divided by sigma."""


def patchify(
    z: Tensor, size: int, *, frames: int = 1, layout: PatchLayout = "channels_first"
) -> Tensor:
    """Tokens (B, N, P) of a latent, P = C * frames * size**2.

    Tokens run over frames, then rows, then columns (the last one fastest). An image counts as one
    frame. Raises ConfigError when the latent is not a whole number of patches.
    """
    video = z.unsqueeze(2) if z.dim() == 4 else z
    batch, channels, *extent = video.shape
    num_t, num_h, num_w = _grid((extent[0], extent[1], extent[2]), size, frames)
    cells = video.reshape(batch, channels, num_t, frames, num_h, size, num_w, size)
    patches = cells.permute(0, 2, 4, 6, 1, 3, 5, 7)  # B, t, h, w, C, p_t, p_h, p_w
    return _join(patches.flatten(1, 3), layout)


def unpatchify(
    tokens_BNP: Tensor,
    extent: tuple[int, ...],
    size: int,
    *,
    frames: int = 1,
    layout: PatchLayout = "channels_first",
) -> Tensor:
    """The latent of ``extent`` (H, W) or (T, H, W) that ``patchify`` cut into these tokens.

    Raises ConfigError when tokens and extent do not fit each other.
    """
    num_frames, height, width = extent if len(extent) == 3 else (1, *extent)
    num_t, num_h, num_w = _grid((num_frames, height, width), size, frames)
    if tokens_BNP.shape[1] != num_t * num_h * num_w:
        raise ConfigError(
            f"{tokens_BNP.shape[1]} tokens do not fill a latent of {extent} with patches of {size}"
            f" ({num_t * num_h * num_w} tokens): pass the extent and size used to cut it"
        )
    patches = _split(tokens_BNP, size, frames, layout).unflatten(1, (num_t, num_h, num_w))
    cells = patches.permute(0, 4, 1, 5, 2, 6, 3, 7)  # B, C, t, p_t, h, p_h, w, p_w
    video = cells.reshape(cells.shape[0], cells.shape[1], num_frames, height, width)
    return video if len(extent) == 3 else video.squeeze(2)


def patch_centres(grid: tuple[int, ...], scale: int) -> Tensor:
    """Centres of coarse patches, (N, len(grid)) float32 in units of base tokens.

    ``grid`` counts coarse patches, (rows, columns) or (frames, rows, columns); a coarse patch
    covers ``scale`` base tokens a side and one frame. Patch ``i`` stands at
    ``scale * i + (scale - 1) / 2``, the mean position of the base tokens under it, so rotary phases
    stay those of the base grid. Order of tokens as in ``patchify``.
    """
    axes = [torch.arange(count, dtype=torch.float32) for count in grid]
    for axis in axes[-2:]:
        axis.mul_(scale).add_((scale - 1) / 2)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def bilinear_matrix(base: int, size: int) -> Tensor:
    """B, (size**2, base**2) float64: bilinear enlargement of a flattened ``base`` x ``base`` patch.

    Column j is the enlarged j-th unit image (pixel centres aligned, edges repeated). Raises
    ConfigError when ``size`` is smaller than ``base``: shrinking has no left inverse.
    """
    if not 1 <= base <= size:
        raise ConfigError(
            f"patch size {size} cannot be initialised from base patch {base}: "
            "choose a size of at least the base patch"
        )
    units = torch.eye(base * base, dtype=torch.float64).view(-1, 1, base, base)
    enlarged = F.interpolate(units, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged.flatten(1).T.contiguous()


def resize_embed(
    weight_DP: Tensor,
    base: int,
    size: int,
    *,
    frames: int = 1,
    layout: PatchLayout = "channels_first",
    init: PatchInit = "pseudo_inverse",
) -> Tensor:
    """First embedding weights for patches of ``size``, from those of ``base``; the bias is kept.

    "pseudo_inverse": an enlarged patch gives the token of the small one, ``w' = w B^+``.
    "sub_patch_average": the token is the mean of the base tokens under the patch, which has the
    smaller error at low noise. A convolution's weight is passed as ``weight.flatten(1)``.
    Raises ConfigError for sizes that do not fit.
    """
    cells = _split(weight_DP, base, frames, layout)
    if init == "sub_patch_average":
        scale = _scale(base, size)
        return _join(_tiled(cells, scale) / scale**2, layout)
    inverse = torch.linalg.pinv(bilinear_matrix(base, size))
    return _join(_mapped(cells, inverse.T, size), layout)


def resize_deembed(
    weight_PD: Tensor,
    bias_P: Tensor | None,
    base: int,
    size: int,
    *,
    frames: int = 1,
    layout: PatchLayout = "channels_first",
    init: PatchInit = "pseudo_inverse",
) -> tuple[Tensor, Tensor | None]:
    """First output weights and bias for patches of ``size``, from those of ``base``.

    "pseudo_inverse": the small patch is predicted and enlarged, ``w' = B w`` and ``b' = B b``.
    "sub_patch_average": it is repeated in each of the base patches under the large one.
    Raises ConfigError for sizes that do not fit.
    """

    def enlarged(rows: Tensor) -> Tensor:
        cells = _split(rows, base, frames, layout)
        if init == "sub_patch_average":
            return _join(_tiled(cells, _scale(base, size)), layout)
        return _join(_mapped(cells, bilinear_matrix(base, size), size), layout)

    bias = None if bias_P is None else enlarged(bias_P[None])[0]
    return enlarged(weight_PD.T).T.contiguous(), bias


class PooledLatent(NamedTuple):
    """A small latent that is again a sample of the flow, at a lower noise level."""

    latent: Tensor
    """Pooled and divided by ``scale_B``: ``(1 - sigma') mean(x0) + sigma' eps``, unit eps."""
    sigma_B: Tensor
    """sigma', the noise level to tell the model."""
    scale_B: Tensor
    """k, what the pooled latent was divided by."""


def pool_snr_matched(z: Tensor, sigma_B: Tensor, scale: int) -> PooledLatent:
    """Average ``scale`` x ``scale`` pixels and restore the form of the flow.

    The mean of ``scale**2`` independent noises has deviation ``1 / scale``, so the pooled latent is
    ``(1 - sigma) mean(x0) + (sigma / scale) eps``. Divided by ``k = (1 - sigma) + sigma / scale``
    it is a latent at ``sigma' = (sigma / scale) / k``. A base model then runs on it at its own
    patch size: a coarse mode without new weights. Raises ConfigError when the latent does not
    divide.
    """
    sigma_B = sigma_B.to(z)
    k_B = (1 - sigma_B) + sigma_B / scale
    return PooledLatent(_pool(z, scale) / _like(k_B, z), sigma_B / scale / k_B, k_B)


def velocity_from_pooled(
    z: Tensor,
    sigma_B: Tensor,
    pooled: PooledLatent,
    velocity: Tensor,
    *,
    upsampling: Upsampling = "bilinear",
) -> Tensor:
    """Full-resolution velocity from the model's ``velocity`` at the pooled latent.

    The clean image is read off at coarse resolution and enlarged, and the noise is what remains:
    ``v = (z - Up(x0)) / sigma``. Needs ``sigma > 0`` (not checked: it would stall the device) and
    serves high noise; below about 0.5 the lost detail, divided by sigma, outweighs the saving.
    """
    scale = z.shape[-1] // pooled.latent.shape[-1]
    clean = pooled.latent - _like(pooled.sigma_B, z) * velocity
    return (z - _upsample(clean, scale, upsampling)) / _like(sigma_B.to(z), z)


def analytic_noise_velocity(
    z: Tensor,
    sigma_B: Tensor,
    velocity: Tensor,
    scale: int,
    *,
    upsampling: Upsampling = "bilinear",
) -> Tensor:
    """Velocity whose noise comes from ``z`` and whose image comes from a coarse ``velocity``.

    Coarse tokens cannot carry the noise of every pixel, so the coarse branch (``velocity`` at full
    resolution) gives only ``x0 = Up(Pool(z) - sigma Pool(velocity))`` and the result is
    ``(z - x0) / sigma``. Samples with sigma below ``MIN_NOISE_PATH_SIGMA`` keep ``velocity``.
    """
    sigma = _like(sigma_B.to(z), z)
    clean = _upsample(_pool(z - sigma * velocity, scale), scale, upsampling)
    # The clamp keeps the unused branch finite, so that its gradient is zero and not NaN.
    noise_path = (z - clean) / sigma.clamp(min=MIN_NOISE_PATH_SIGMA)
    return torch.where(sigma >= MIN_NOISE_PATH_SIGMA, noise_path, velocity)


def _grid(extent: tuple[int, int, int], size: int, frames: int) -> tuple[int, int, int]:
    num_frames, height, width = extent
    if num_frames % frames or height % size or width % size:
        raise ConfigError(
            f"a latent of {num_frames} x {height} x {width} (frames, rows, columns) is not a whole "
            f"number of {frames} x {size} x {size} patches: pad it or leave this patch size out"
        )
    return num_frames // frames, height // size, width // size


def _scale(base: int, size: int) -> int:
    if size % base:
        raise ConfigError(
            f"patch size {size} is not a multiple of the base patch {base}, which "
            "sub_patch_average needs: use pseudo_inverse"
        )
    return size // base


def _split(values_NP: Tensor, size: int, frames: int, layout: PatchLayout) -> Tensor:
    """(..., P) to (..., C, p_t, p_h, p_w)."""
    if values_NP.shape[-1] % (frames * size * size):
        raise ConfigError(
            f"{values_NP.shape[-1]} values are not a whole number of channels of a patch of "
            f"{frames} x {size} x {size}: pass the patch size these weights were made for"
        )
    if layout == "channels_first":
        return values_NP.unflatten(-1, (-1, frames, size, size))
    return values_NP.unflatten(-1, (frames, size, size, -1)).movedim(-1, -4)


def _join(cells: Tensor, layout: PatchLayout) -> Tensor:
    """(..., C, p_t, p_h, p_w) to (..., P)."""
    return (cells if layout == "channels_first" else cells.movedim(-4, -1)).flatten(-4)


def _mapped(cells: Tensor, matrix: Tensor, size: int) -> Tensor:
    """A (size**2, base**2) matrix applied to every flattened spatial patch, in float64."""
    flat = cells.flatten(-2).double() @ matrix.T.to(cells.device)
    return flat.unflatten(-1, (size, size)).to(cells.dtype)


def _tiled(cells: Tensor, scale: int) -> Tensor:
    return cells.repeat(*[1] * (cells.dim() - 2), scale, scale)


def _like(values_B: Tensor, z: Tensor) -> Tensor:
    """One value per sample, shaped to scale ``z``."""
    return values_B.view(-1, *[1] * (z.dim() - 1))


def _pool(z: Tensor, scale: int) -> Tensor:
    _grid((1, z.shape[-2], z.shape[-1]), scale, 1)
    cells = z.unflatten(-1, (-1, scale)).unflatten(-3, (-1, scale))
    return cells.mean(dim=(-3, -1))


def _upsample(z: Tensor, scale: int, mode: Upsampling) -> Tensor:
    """Enlarge rows and columns; the frames of a video one by one."""
    frames = z.flatten(0, -3).unsqueeze(1)
    align = False if mode == "bilinear" else None
    enlarged = F.interpolate(frames, scale_factor=scale, mode=mode, align_corners=align)
    return enlarged.reshape(*z.shape[:-2], z.shape[-2] * scale, z.shape[-1] * scale)
