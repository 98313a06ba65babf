"""How good generated images are, by measures that need nothing downloaded.

Distances between two sets of images tell whether samples are distributed as data is; comparisons
of image with image tell how far a fast sampler departs from a slow one with the same noise. Report
more than one: the Frechet distance hardly sees faint noise, the sliced Wasserstein distance hardly
sees a missing class. Both are biased upwards in small sets, so compare sets of equal size, of 900
images or more.

Images are float (B, C, H, W) or videos (B, C, T, H, W) in [-1, 1]; features (N, D). All sums run in
fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError

PIXEL_RANGE = 2.0
"""From -1 to 1."""
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5
"""The window of Wang et al.: a Gaussian of this spread in pixels, cut off at 11 x 11."""
COPY_RATIO = 1 / 3
"""A sample this much nearer to one training image than to all others is a copy of it."""
CHUNK_ROWS = 1024


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians with the means and covariances of the sets.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al., arXiv 1706.08500). Raises
    ConfigError for sets of fewer than two rows, or of other widths.
    """
    a, b = _pair(features_a, features_b, at_least=2)
    spread_a, spread_b = (x.T.cov().reshape(x.shape[1], -1) for x in (a, b))
    # The eigenvalues of S_a S_b are those of a symmetric matrix, which has no imaginary ones.
    values, vectors = torch.linalg.eigh(spread_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ spread_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + spread_a.trace() + spread_b.trace() - 2 * shared)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, without bias.

    The kernel inception distance of Binkowski et al. (arXiv 1801.01401), on any features, from all
    pairs. It is 0 on average, and so negative at times, between sets of one distribution, of any
    size. Raises ConfigError for sets of fewer than two rows, or of other widths.
    """
    a, b = _pair(features_a, features_b, at_least=2)

    def mean(x: Tensor, y: Tensor, *, same: bool) -> Tensor:
        total = x.new_zeros(())
        for chunk in x.split(CHUNK_ROWS):
            total += (chunk @ y.T / x.shape[1] + 1).pow(3).sum()
        if not same:
            return total / (len(x) * len(y))
        total -= (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return total / (len(x) * (len(x) - 1))

    return float(mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False))


def sliced_wasserstein(a: Tensor, b: Tensor, num_projections: int = 256, seed: int = 0) -> float:
    """Wasserstein-2 distance of two sets along random directions: the root of the mean square.

    Sets of any shape (N, ...), of any sizes, flattened to vectors. Directions have unit length, so
    that a shift of all pixels of all images by one sign pattern of size e gives about e. Raises
    ConfigError for empty sets, or of other shapes.
    """
    a, b = _pair(a.flatten(1), b.flatten(1), at_least=1)
    generator = torch.Generator().manual_seed(seed)
    shape = (a.shape[1], num_projections)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64).to(a.device)
    directions /= directions.norm(dim=0)
    along_a, along_b = ((x @ directions).sort(dim=0).values for x in (a, b))
    # Both quantile functions are steps; between two neighbouring steps of either, both are flat.
    ends = [torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x) for x in (a, b)]
    steps = torch.cat(ends).unique()
    widths = steps.diff(prepend=steps.new_zeros(1))
    middles = steps - widths / 2
    at_a, at_b = ((middles * len(x)).long().clamp(max=len(x) - 1) for x in (a, b))
    gaps = (along_a[at_a.to(a.device)] - along_b[at_b.to(a.device)]).square().mean(1)
    return math.sqrt(float((gaps * widths.to(a.device)).sum()))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) fp64, in dB; infinite where they are equal."""
    _check_same_shape(images, reference)
    error_B = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(PIXEL_RANGE**2 / error_B)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) fp64; 1 where they are equal.

    Wang et al. 2004, with Gaussian windows that lie inside the image; the mean over windows,
    channels and frames. Raises ConfigError for images smaller than a window.
    """
    _check_same_shape(images, reference)
    size = 2 * SSIM_RADIUS + 1
    if min(images.shape[-2:]) < size:
        raise ConfigError(
            f"images of {tuple(images.shape[-2:])} pixels are smaller than SSIM's window of {size}"
            f" x {size}; use PSNR"
        )
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    taps = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    taps = (taps / taps.sum()).to(images.device)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    planes = (t.double().reshape(-1, 1, *t.shape[-2:]) for t in (images, reference))
    x, y = planes
    mean_x, mean_y = blurred(x), blurred(y)
    var_x = blurred(x * x) - mean_x**2
    var_y = blurred(y * y) - mean_y**2
    cov = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PIXEL_RANGE) ** 2, (0.03 * PIXEL_RANGE) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return likeness.reshape(len(images), -1).mean(1)


class Memorisation(NamedTuple):
    """How much nearer than unseen images samples are to training images."""

    distance_ratio: float
    """Median distance of samples to the nearest training image, over that of held-out images.
    About 1: as new as unseen images are. Near 0: copies."""
    copied_fraction: float
    """Samples nearer to one training image than COPY_RATIO times the way to the second nearest."""


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compare distances, of pixels or of features, from samples and held-out images to train.

    Sets of any shape (N, ...); distances are Euclidean. Raises ConfigError for fewer than two
    training images, or other shapes.
    """
    samples, train = _pair(samples.flatten(1), train.flatten(1), at_least=1)
    held_out, train = _pair(held_out.flatten(1), train, at_least=1)
    if len(train) < 2:
        raise ConfigError("memorisation needs two training images or more")

    def nearest(x: Tensor) -> Tensor:
        rows = [
            torch.cdist(chunk, train, compute_mode="donot_use_mm_for_euclid_dist")
            for chunk in x.split(CHUNK_ROWS)
        ]
        return torch.cat([row.topk(2, largest=False).values for row in rows])

    of_samples, of_held_out = nearest(samples), nearest(held_out)
    copied = of_samples[:, 0] < COPY_RATIO * of_samples[:, 1]
    ratio = of_samples[:, 0].median() / of_held_out[:, 0].median()
    return Memorisation(float(ratio), float(copied.double().mean()))


def _pair(a: Tensor, b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Both sets in fp64, once they can be compared."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < at_least:
        raise ConfigError(
            f"sets of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: rows must "
            f"be of one width, and {at_least} or more in each"
        )
    return a.double(), b.double()


def _check_same_shape(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise ConfigError(
            f"images of shapes {tuple(images.shape)} and {tuple(reference.shape)} cannot be "
            "compared one by one"
        )
