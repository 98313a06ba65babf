"""Measures against closed forms and scikit-image, and the order they put spoilt images in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.testing import assert_close

from trinity.core.errors import ConfigError
from trinity.train.quality import (
    frechet_distance,
    kernel_distance,
    memorisation,
    psnr,
    sliced_wasserstein,
    ssim,
)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _with_moments(mean: Tensor, cov: Tensor, num_rows: int, seed: int) -> Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    x = _normal(num_rows, len(mean), seed=seed)
    x = x - x.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(x.T.cov()))
    return x @ whitening.T @ torch.linalg.cholesky(cov).T + mean


def _covariance(size: int, seed: int) -> Tensor:
    root = _normal(size, size, seed=seed)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def test_frechet_distance_of_known_gaussians() -> None:
    """The square root of S_a S_b straight from its eigenvectors, which are not orthogonal."""
    mean_a, mean_b = _normal(5), _normal(5, seed=1)
    cov_a, cov_b = _covariance(5, 2), _covariance(5, 3)
    values, vectors = torch.linalg.eig(cov_a @ cov_b)
    root = (vectors * values.sqrt() @ torch.linalg.inv(vectors)).real
    assert_close(root @ root, cov_a @ cov_b)
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * root).trace()
    a, b = _with_moments(mean_a, cov_a, 40, 4), _with_moments(mean_b, cov_b, 63, 5)
    assert_close(frechet_distance(a, b), float(expected), rtol=1e-9, atol=1e-9)
    assert_close(frechet_distance(b, a), float(expected), rtol=1e-9, atol=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-9
    assert_close(frechet_distance(a, a + mean_b), float(mean_b.square().sum()), rtol=1e-9, atol=0)
    narrow = frechet_distance(a[:, :1], b[:, :1])
    spreads = float(cov_a[0, 0].sqrt() - cov_b[0, 0].sqrt())
    assert_close(narrow, float(mean_a[0] - mean_b[0]) ** 2 + spreads**2, rtol=1e-9, atol=1e-12)


def test_frechet_distance_of_fewer_rows_than_features_and_of_constant_ones() -> None:
    a, b = _normal(4, 30), _normal(5, 30, seed=1)
    assert frechet_distance(a, b) > 0
    still = torch.zeros(6, 30)
    spread = float(a.T.cov().trace())
    assert_close(frechet_distance(a - a.mean(0), still), spread, rtol=1e-9, atol=0)


def _kernel_by_hand(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum(kernel(x[i], y[j]) for i, j in pairs) / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def test_kernel_distance_is_the_mean_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _normal(7, 3), 0.5 + _normal(11, 3, seed=1)
    expected = _kernel_by_hand(a, b)
    assert_close(kernel_distance(a, b), expected, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr("trinity.train.quality.CHUNK_ROWS", 3)
    assert_close(kernel_distance(a, b), expected, rtol=1e-10, atol=1e-12)


def test_kernel_distance_has_no_bias_in_small_sets() -> None:
    """200 pairs of sets of 8: their mean is 0 within three standard errors, so half are negative.

    With the diagonal of both sets in it would be about 2 (k(x, x) - E k) / 8, far above."""
    pairs = _normal(200, 2, 8, 4)
    values = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(200)
    assert 50 < int((values < 0).sum()) < 150


def test_sliced_wasserstein_of_shifted_sets() -> None:
    """The same along every direction u: |u . shift|; over the sphere its square has mean 1/D."""
    a, shift = _normal(50, 1, 4, 4), _normal(1, 4, 4, seed=1)
    got = sliced_wasserstein(a[torch.randperm(50)] + shift, a, num_projections=20_000)
    assert_close(got, math.sqrt(float(shift.square().sum()) / 16), rtol=0.02, atol=0)
    assert sliced_wasserstein(a, a.flip(0)) < 1e-12
    one = sliced_wasserstein(a, a + shift, num_projections=3, seed=4)
    assert one == sliced_wasserstein(a, a + shift, num_projections=3, seed=4)
    assert one != sliced_wasserstein(a, a + shift, num_projections=3, seed=5)


def test_sliced_wasserstein_of_one_number_per_image() -> None:
    """In one dimension there is only one direction, and sorting is the best pairing."""
    a, b = _normal(31, 1), 2 * _normal(31, 1, seed=1)
    expected = (a.sort(0).values - b.sort(0).values).square().mean().sqrt()
    assert_close(sliced_wasserstein(a, b, num_projections=2), float(expected))
    # Of sets of 2 and 3: 0 0 0 6 6 6 against 1 1 4 4 7 7, each a sixth.
    small = sliced_wasserstein(torch.tensor([[6.0], [0.0]]), torch.tensor([[4.0], [1.0], [7.0]]))
    assert_close(small, math.sqrt((1 + 1 + 16 + 4 + 1 + 1) / 6))
    twice = a.repeat(2, 1)
    assert sliced_wasserstein(a, twice) < 1e-12


@pytest.mark.parametrize("shape", [(3, 3, 24, 17), (2, 1, 11, 11)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    reference = _normal(*shape).clamp(-1, 1)
    images = (reference + 0.3 * _normal(*shape, seed=1)).clamp(-1, 1)
    similarity, ratio = ssim(images, reference), psnr(images, reference)
    for row, (one, other) in enumerate(zip(images.numpy(), reference.numpy(), strict=True)):
        theirs: Any = structural_similarity(
            one,
            other,
            data_range=2.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert_close(float(similarity[row]), float(theirs), rtol=1e-9, atol=1e-9)
        theirs = peak_signal_noise_ratio(other, one, data_range=2.0)
        assert_close(float(ratio[row]), float(theirs), rtol=1e-9, atol=0)


def test_videos_are_compared_frame_by_frame() -> None:
    reference = _normal(2, 3, 4, 16, 16)
    video = reference + 0.2 * _normal(2, 3, 4, 16, 16, seed=1)
    frames = [ssim(video[:, :, t], reference[:, :, t]) for t in range(4)]
    assert_close(ssim(video, reference), torch.stack(frames).mean(0))
    assert psnr(reference, reference).tolist() == [math.inf] * 2
    assert_close(ssim(reference, reference), torch.ones(2, dtype=torch.float64))
    assert_close(psnr(reference, reference + 0.2), torch.full((2,), 20.0, dtype=torch.float64))


def test_memorisation_tells_copies_from_new_images() -> None:
    train, held_out, new = (_normal(400, 6, seed=i) for i in range(3))
    fresh = memorisation(new, train, held_out)
    assert abs(fresh.distance_ratio - 1) < 0.15
    assert fresh.copied_fraction < 0.1
    copies = train[:100] + 0.01 * _normal(100, 6, seed=9)
    mixed = memorisation(torch.cat([copies, new[:50]]), train, held_out)
    assert mixed.distance_ratio < 0.1
    assert 0.6 < mixed.copied_fraction <= 0.7
    assert memorisation(train, train, held_out).distance_ratio == 0
    # By hand: distances (1, 4) and (3, 5) to the two training images.
    pair = torch.tensor([[0.0], [5.0]])
    by_hand = memorisation(torch.tensor([[1.0], [-1.0]]), pair, torch.tensor([[7.0]]))
    assert by_hand == (0.5, 1.0)
    assert memorisation(torch.tensor([[2.0]]), pair, torch.tensor([[7.0]])).copied_fraction == 0


def test_sets_that_cannot_be_compared_are_refused() -> None:
    a = torch.zeros(3, 4)
    for one, other in ((a[:1], a), (a, a[:1]), (a, torch.zeros(3, 5))):
        with pytest.raises(ConfigError, match=r"sets of shapes .* cannot be compared"):
            frechet_distance(one, other)
        with pytest.raises(ConfigError, match=r"sets of shapes .* cannot be compared"):
            kernel_distance(one, other)
    with pytest.raises(ConfigError, match="1 or more in each"):
        sliced_wasserstein(a, a[:0])
    with pytest.raises(ConfigError, match="two training images"):
        memorisation(a, a[:1], a)
    small = torch.zeros(1, 1, 8, 30)
    with pytest.raises(ConfigError, match=r"\(8, 30\) pixels are smaller than SSIM's window of 11"):
        ssim(small, small)
    with pytest.raises(ConfigError, match="cannot be compared one by one"):
        psnr(small, small[..., :8])
