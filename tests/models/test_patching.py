"""Cutting a latent, weights for larger patches, coordinates and coarse velocities."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.models.patching import (
    PatchInit,
    PatchLayout,
    Upsampling,
    analytic_noise_velocity,
    bilinear_matrix,
    patch_centres,
    patchify,
    pool_snr_matched,
    resize_deembed,
    resize_embed,
    unpatchify,
    velocity_from_pooled,
)

LAYOUTS: tuple[PatchLayout, ...] = ("channels_first", "channels_last")
SIZES = [(1, 2), (1, 3), (1, 4), (2, 4), (2, 8), (3, 6), (3, 9), (3, 5), (4, 4)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _enlarged(cells: Tensor, size: int) -> Tensor:
    """Bilinear enlargement by the library, (N, C, p, p) to (N, C, size, size)."""
    return F.interpolate(cells, size=(size, size), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "size", "frames"),
    [
        ((2, 3, 6, 10), 2, 1),
        ((1, 5, 9, 3), 3, 1),
        ((2, 4, 7, 5), 1, 1),
        ((2, 3, 4, 6, 10), 2, 2),
        ((1, 2, 3, 4, 8), 4, 1),
    ],
)
def test_unpatchify_undoes_patchify(
    shape: tuple[int, ...], size: int, frames: int, layout: PatchLayout
) -> None:
    z = torch.randn(shape)
    tokens = patchify(z, size, frames=frames, layout=layout)
    assert tokens.shape[2] == shape[1] * frames * size * size
    assert torch.equal(unpatchify(tokens, shape[2:], size, frames=frames, layout=layout), z)


def test_tokens_are_those_of_a_strided_convolution() -> None:
    """Rows before columns, frames before rows, and (C, p_t, p_h, p_w) inside a token."""
    z = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    weight = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    expected = F.conv2d(z, weight, stride=2).flatten(2).mT
    torch.testing.assert_close(patchify(z, 2) @ weight.flatten(1).T, expected)
    video = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    weight = torch.randn(7, 3, 2, 2, 2, dtype=torch.float64)
    expected = F.conv3d(video, weight, stride=2).flatten(2).mT
    torch.testing.assert_close(patchify(video, 2, frames=2) @ weight.flatten(1).T, expected)


def test_channels_last_orders_frames_rows_columns_channels() -> None:
    video = torch.randn(1, 3, 4, 6, 8)
    token_P = patchify(video, 2, frames=2, layout="channels_last")[0, 1 * 3 * 4 + 2 * 4 + 1]
    places = itertools.product(range(2), range(2), range(2), range(3))  # p_t, p_h, p_w, C
    expected = [video[0, c, 2 + t, 4 + h, 2 + w] for t, h, w, c in places]
    assert torch.equal(token_P, torch.stack(expected))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole number"):
        patchify(torch.zeros(1, 1, 6, 5), 2)
    with pytest.raises(ConfigError, match="whole number"):
        patchify(torch.zeros(1, 1, 3, 4, 4), 2, frames=2)
    with pytest.raises(ConfigError, match="do not fill"):
        unpatchify(torch.zeros(1, 5, 4), (4, 4), 2)
    with pytest.raises(ConfigError, match="cannot be initialised"):
        bilinear_matrix(4, 2)
    with pytest.raises(ConfigError, match="not a multiple"):
        resize_embed(torch.zeros(2, 9), 3, 5, init="sub_patch_average")
    with pytest.raises(ConfigError, match="number of channels"):
        resize_embed(torch.zeros(2, 9), 2, 4)
    with pytest.raises(ConfigError, match="whole number"):
        pool_snr_matched(torch.zeros(1, 1, 6, 5), torch.ones(1), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("base", "size"), SIZES)
def test_an_enlarged_patch_gives_the_same_token(base: int, size: int, layout: PatchLayout) -> None:
    patches = torch.randn(11, 3, base, base, dtype=torch.float64)
    weight_DP = torch.randn(5, 3 * base * base, dtype=torch.float64)
    expected = patchify(patches, base, layout=layout) @ weight_DP.T
    resized = resize_embed(weight_DP, base, size, layout=layout)
    token = patchify(_enlarged(patches, size), size, layout=layout) @ resized.T
    torch.testing.assert_close(token, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("base", "size"), SIZES)
def test_the_output_patch_is_the_enlarged_one(base: int, size: int, layout: PatchLayout) -> None:
    token_ND = torch.randn(11, 5, dtype=torch.float64)
    weight_PD = torch.randn(3 * base * base, 5, dtype=torch.float64)
    bias_P = torch.randn(3 * base * base, dtype=torch.float64)
    small = (token_ND @ weight_PD.T + bias_P)[:, None]
    expected = _enlarged(unpatchify(small, (base, base), base, layout=layout), size)
    weight, bias = resize_deembed(weight_PD, bias_P, base, size, layout=layout)
    assert bias is not None
    large = (token_ND @ weight.T + bias)[:, None]
    actual = unpatchify(large, (size, size), size, layout=layout)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert resize_deembed(weight_PD, None, base, size, layout=layout)[1] is None


@pytest.mark.parametrize("init", ["pseudo_inverse", "sub_patch_average"])
def test_one_pixel_patches_are_divided_and_copied(init: PatchInit) -> None:
    weight_DP = torch.randn(5, 3, dtype=torch.float64)
    resized = resize_embed(weight_DP, 1, 4, init=init).view(5, 3, 16)
    torch.testing.assert_close(resized, (weight_DP / 16)[..., None].expand(-1, -1, 16))
    weight, _ = resize_deembed(weight_DP.T, None, 1, 4, init=init)
    torch.testing.assert_close(weight.view(3, 16, 5), weight_DP.T[:, None].expand(-1, 16, -1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("base", "size"), [(2, 4), (3, 6), (2, 8)])
def test_sub_patch_average_is_the_mean_of_the_tokens_below(
    base: int, size: int, layout: PatchLayout
) -> None:
    """On a video with temporal patches; the output repeats the base patch."""
    video = torch.randn(2, 3, 2, size, size, dtype=torch.float64)
    weight_DP = torch.randn(5, 3 * 2 * base * base, dtype=torch.float64)
    fine = patchify(video, base, frames=2, layout=layout) @ weight_DP.T
    how = {"frames": 2, "layout": layout, "init": "sub_patch_average"}
    resized = resize_embed(weight_DP, base, size, **how)
    coarse = patchify(video, size, frames=2, layout=layout) @ resized.T
    torch.testing.assert_close(coarse, fine.mean(dim=1, keepdim=True))
    weight, _ = resize_deembed(weight_DP.T, None, base, size, **how)
    large = unpatchify(coarse @ weight.T, (2, size, size), size, frames=2, layout=layout)
    repeated = (coarse @ weight_DP).expand(-1, fine.shape[1], -1)
    small = unpatchify(repeated, (2, size, size), base, frames=2, layout=layout)
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_centres_are_mean_positions_of_the_base_tokens(scale: int) -> None:
    rows, columns = 3 * scale, 2 * scale
    positions = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ).float()
    cut = patchify(positions[None], scale)[0].unflatten(1, (2, scale * scale))
    assert torch.equal(patch_centres((3, 2), scale), cut.mean(dim=2))
    video = patch_centres((2, 3, 2), scale)
    assert torch.equal(video[6:, 1:], patch_centres((3, 2), scale))
    assert video[:, 0].tolist() == [0.0] * 6 + [1.0] * 6


def _per_sample(values_B: Tensor, dims: int) -> Tensor:
    return values_B.view(-1, *[1] * (dims - 1))


@pytest.mark.parametrize("scale", [2, 4])
def test_pooled_latents_are_samples_of_the_flow(scale: int) -> None:
    """Mean and deviation over many noises, and the log-SNR raised by 2 log(scale)."""
    sigma_B = torch.tensor([0.95, 0.6, 0.2], dtype=torch.float64)
    clean = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    draws = torch.randn(4000, *clean.shape, dtype=torch.float64)
    sigma = _per_sample(sigma_B, 4)
    noisy = ((1 - sigma) * clean + sigma * draws).transpose(0, 1)  # samples first, as a video
    pooled = pool_snr_matched(noisy.flatten(1, 2), sigma_B, scale)
    small = pooled.latent.unflatten(1, (4000, 2))
    mean_x0 = F.avg_pool2d(clean, scale)
    level = _per_sample(pooled.sigma_B, 4)
    torch.testing.assert_close(small.mean(dim=1), (1 - level) * mean_x0, rtol=0, atol=0.08)
    deviation_B = small.std(dim=1).flatten(1).mean(dim=1)
    torch.testing.assert_close(deviation_B, pooled.sigma_B, rtol=0.01, atol=0)
    torch.testing.assert_close(
        (1 - pooled.sigma_B) / pooled.sigma_B, scale * (1 - sigma_B) / sigma_B
    )


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_an_exact_coarse_velocity_gives_the_exact_fine_one(
    upsampling: Upsampling, video: bool
) -> None:
    """For an image that the enlargement reproduces: flat, or flat inside each block."""
    cells = 1 if upsampling == "bilinear" else 4
    lead = (3, 2, 2) if video else (3, 2)
    image = torch.randn(*lead, cells, cells, dtype=torch.float64)
    small_x0 = image.expand(*lead, 4, 4)
    x0 = small_x0.repeat_interleave(2, -1).repeat_interleave(2, -2)
    noise = torch.randn_like(x0)
    sigma_B = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
    sigma = _per_sample(sigma_B, x0.dim())
    z = (1 - sigma) * x0 + sigma * noise
    pooled = pool_snr_matched(z, sigma_B, 2)
    level = _per_sample(pooled.sigma_B, x0.dim())
    small_noise = (pooled.latent - (1 - level) * small_x0) / level
    velocity = velocity_from_pooled(
        z, sigma_B, pooled, small_noise - small_x0, upsampling=upsampling
    )
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-12)


def test_noise_path_restores_what_coarse_tokens_cannot_say() -> None:
    """A coarse branch that knows block means only is completed at high noise, kept at low."""
    x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x0 = x0.repeat_interleave(2, -1).repeat_interleave(2, -2)
    noise = torch.randn_like(x0)
    sigma_B = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    sigma = _per_sample(sigma_B, 4)
    z = (1 - sigma) * x0 + sigma * noise
    fine = noise - x0
    means = F.avg_pool2d(fine, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    coarse = means.requires_grad_()
    velocity = analytic_noise_velocity(z, sigma_B, coarse, 2, upsampling="nearest")
    torch.testing.assert_close(velocity[:2], fine[:2], rtol=0, atol=1e-12)
    assert torch.equal(velocity[2], coarse[2])
    velocity.sum().backward()
    assert coarse.grad is not None
    torch.testing.assert_close(coarse.grad, torch.ones_like(coarse))
