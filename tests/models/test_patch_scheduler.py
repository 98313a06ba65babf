"""The rule that chooses patch sizes: differences, blocks, holding a size, calibration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.models.patch_scheduler import (
    Normalization,
    PatchDecision,
    PatchScheduler,
    block_deviation,
    calibrate_tau,
    path_difference,
    token_fraction,
)

NUM_STEPS = 50
PIXELS = 16


def _sigmas(shift: float = 1.0, num_steps: int = NUM_STEPS) -> list[float]:
    uniform = [1 - k / num_steps for k in range(num_steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in uniform]


def _follow(
    scheduler: PatchScheduler, latents: list[Tensor], sigmas: list[float]
) -> tuple[Tensor, Tensor]:
    """Sizes (K, B) and statistics (K, B, S) along a path that does not react to them."""
    decision = scheduler.first(latents[0].shape[0])
    log: list[PatchDecision] = []
    for step in range(len(sigmas) - 1):
        decision = scheduler.decide(
            decision,
            latents[: step + 1],
            sigmas[: step + 1],
            step=step,
            num_steps=len(sigmas) - 1,
        )
        log.append(decision)
    return torch.stack([d.scale_B for d in log]), torch.stack([d.statistic_BS for d in log])


def _polynomial(degree: int, xs: list[float], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(degree + 1, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [torch.stack([c * x**n for n, c in enumerate(terms)]).sum(dim=0) for x in xs]


def test_third_difference_of_a_cubic_is_constant_and_of_a_quadratic_zero() -> None:
    steps = [float(k) for k in range(7)]
    sigmas = _sigmas()[:7]
    cubic, quadratic = _polynomial(3, steps), _polynomial(2, steps)
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(4, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    for k in range(4):
        window = slice(k, k + 4)
        bend = path_difference(cubic[window], sigmas[window], normalize="raw")
        torch.testing.assert_close(bend, 6 * terms[3], rtol=0, atol=1e-11)
        flat = path_difference(quadratic[window], sigmas[window], normalize="raw")
        torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_divided_differences_are_the_raw_ones_for_fifty_uniform_steps(order: int) -> None:
    sigmas = _sigmas()[10 : 11 + order]
    latents = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in sigmas]
    divided = path_difference(latents, sigmas)
    raw = path_difference(latents, sigmas, normalize="raw")
    torch.testing.assert_close(divided, raw, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_steps", [20, 50, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_divided_differences_do_not_see_the_steps(shift: float, num_steps: int) -> None:
    """A cubic in sigma has one third derivative, whatever the spacing."""
    sigmas = _sigmas(shift, num_steps)
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(4, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    path = _polynomial(3, sigmas)
    for k in (0, num_steps // 2, num_steps - 3):
        bend = path_difference(path[k : k + 4], sigmas[k : k + 4])
        torch.testing.assert_close(bend, -6 * terms[3] / 50**3, rtol=0, atol=1e-8)


def _bending_path(sigmas: list[float]) -> list[Tensor]:
    """Two samples whose third derivative grows as sigma falls, at different rates."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    rate = torch.tensor([4.0, 6.0], dtype=torch.float64).view(2, 1, 1, 1)
    return [direction * torch.exp(-rate * sigma) for sigma in sigmas]


def _sigma_of_first_fine(
    shift: float, normalize: Normalization, path: list[Tensor], tau: float
) -> list[float]:
    """Middle of the four latents on which each sample left the coarse sizes."""
    sigmas = _sigmas(shift)
    scheduler = PatchScheduler(tau, normalize=normalize, hold=1, min_fine_last=0, sizes=(1, 2))
    sizes_KB, _ = _follow(scheduler, path, sigmas)
    stops = [int((sizes_KB[:, b] == 2).nonzero().max()) + 1 for b in range(2)]
    assert all(stop < NUM_STEPS for stop in stops)
    return [sum(sigmas[stop - 3 : stop + 1]) / 4 for stop in stops]


@pytest.mark.parametrize("tau", [1e-4, 2e-4])
def test_divided_form_decides_alike_for_shift_one_and_three(tau: float) -> None:
    """Same size at the same noise level of the same path; raw differences decide elsewhere."""
    found = {
        (normalize, shift): _sigma_of_first_fine(
            shift, normalize, _bending_path(_sigmas(shift)), tau
        )
        for normalize in ("divided", "raw")
        for shift in (1.0, 3.0)
    }
    uniform, shifted = found["divided", 1.0], found["divided", 3.0]
    assert uniform[0] != pytest.approx(uniform[1], abs=0.05)
    assert shifted == pytest.approx(uniform, abs=0.03)  # half a step of each sampler
    raw = found["raw", 3.0]
    assert all(abs(a - b) > 0.15 for a, b in zip(raw, uniform, strict=True))


def test_raw_form_sees_the_schedule_on_a_straight_path() -> None:
    sigmas = _sigmas(3.0)
    path = _polynomial(1, sigmas)
    divided = PatchScheduler(1e-4).statistic(path[-4:], sigmas[-4:])
    raw = PatchScheduler(1e-4, normalize="raw").statistic(path[-4:], sigmas[-4:])
    assert divided.max() < 1e-9
    assert raw.min() > 1e-4


def test_block_deviation_joins_channels_or_averages_them() -> None:
    z = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    joint, single = block_deviation(z, 4), block_deviation(z, 4, channels="per_channel_mean")
    for sample in range(2):
        for row in range(2):
            for column in range(3):
                block = z[sample, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                at = row * 3 + column
                assert joint[sample, at] == pytest.approx(float(block.std(correction=0)))
                mean = block.flatten(1).std(dim=1, correction=0).mean()
                assert single[sample, at] == pytest.approx(float(mean))


def test_video_blocks_stay_inside_a_frame() -> None:
    """A jump between frames is not seen, a jump inside one is; quantile over all frames."""
    video = torch.randn(2, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1).clone()
    still = block_deviation(video, 4)
    video += torch.arange(5.0).view(1, 1, 5, 1, 1)
    torch.testing.assert_close(block_deviation(video, 4), still, rtol=0, atol=1e-5)
    frames = [block_deviation(video[:, :, t], 4) for t in range(5)]
    torch.testing.assert_close(block_deviation(video, 4), torch.cat(frames, dim=1))


def test_statistic_is_the_quantile_over_blocks() -> None:
    """A textured minority is seen from its share on; the mean would react to any."""
    sigmas = _sigmas()[:4]
    bend = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    bend[0, :, :8, :8], bend[1] = pattern.repeat(4, 4), pattern.repeat(8, 8)
    path = [torch.zeros_like(bend)] * 3 + [bend]
    scheduler = PatchScheduler(1e-3, normalize="raw")
    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(scheduler.statistic(path, sigmas), expected)
    high = replace(scheduler, rho=0.9).statistic(path, sigmas)
    expected[0, 0], expected[0, 1] = 1.0, 0.7  # of 16 and of 4 blocks, between the last two
    torch.testing.assert_close(high, expected)


def test_largest_size_below_the_threshold_wins() -> None:
    """Even if a smaller size is above it, and never in the first or last steps."""
    sigmas = _sigmas()
    blocks = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    blocks[0] = torch.arange(64.0).view(8, 8)  # neither
    fours = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    blocks[1] = fours.repeat_interleave(4, 0).repeat_interleave(4, 1)  # flat in 4 x 4 only
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(4, 4)
    pattern[:4, :4] = 0  # a quarter is flat: 4 x 4 blocks spread more than the whole
    blocks[3] = pattern / 15  # third differences of 0.53 and 0.46
    path = [blocks * (-1.0) ** k for k in range(len(sigmas))]
    sizes_KB, statistic_KBS = _follow(PatchScheduler(0.5), path, sigmas)
    assert statistic_KBS[:3].isnan().all()
    assert statistic_KBS[3:].isfinite().all()
    assert sizes_KB[3:-5].unique(dim=0).tolist() == [[1, 2, 4, 4]]
    assert (statistic_KBS[3:, 3, 0] > 0.5).all()
    assert (sizes_KB[:3] == 1).all()
    assert (sizes_KB[-5:] == 1).all()


def test_first_and_last_steps_stay_fine_as_asked() -> None:
    path = [torch.zeros(1, 1, 8, 8)] * (NUM_STEPS + 1)
    scheduler = PatchScheduler(1.0, order=2, min_fine_first=7, min_fine_last=1)
    sizes_KB, _ = _follow(scheduler, path, _sigmas())
    assert sizes_KB[:, 0].tolist() == [1] * 7 + [4] * 42 + [1]


def test_a_size_is_kept_for_hold_steps() -> None:
    """Against a statistic that jumps up and down at every step."""
    scheduler = PatchScheduler(0.5, hold=4, min_fine_last=0, order=1, normalize="raw", sizes=(1, 2))
    flat, rough = torch.zeros(1, 1, 8, 8), torch.randn(1, 1, 8, 8) * 10
    decision, sizes = scheduler.first(1), []
    for step in range(3, 40):
        bend = flat if step % 2 else rough
        decision = scheduler.decide(decision, [flat, bend], [1.0, 0.9], step=step, num_steps=50)
        sizes.append(int(decision.scale_B))
    switches = [k for k in range(1, len(sizes)) if sizes[k] != sizes[k - 1]]
    assert sizes[0] == 2  # the fine start is no decision and need not be held
    assert switches[0] >= 4
    assert all(after - before >= 4 for before, after in itertools.pairwise(switches))
    assert len(switches) >= 5


def test_a_statistic_that_is_not_finite_decides_for_the_base_patch() -> None:
    path = [torch.full((1, 1, 8, 8), math.nan)] * 4
    scheduler = PatchScheduler(1e3)
    decision = scheduler.decide(scheduler.first(1), path, _sigmas()[:4], step=3, num_steps=50)
    assert decision.scale_B.tolist() == [1]


def _mixture() -> Tensor:
    """Images of the toy distribution, (M, 1, H, W): smooth on the left, textured on the right."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, PIXELS), torch.linspace(-1, 1, PIXELS), indexing="ij"
    )
    images = []
    for index in range(6):
        a, b, c = torch.randn(3, generator=generator)
        texture = 0.8 * torch.randn(PIXELS, PIXELS, generator=generator) * (x > 0.05 * index)
        images.append(a * x + b * y + c * x * y + texture)
    means = torch.stack(images)[:, None].double()
    return (means - means.mean()) / means.std()


MEANS = _mixture()
SPREAD = 0.05


def _teacher_clean(z: Tensor, sigma: float) -> Tensor:
    """Exact E[x0 | z] of a Gaussian mixture around ``MEANS``."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    offset = z[:, None] - (1 - sigma) * MEANS
    weight = torch.softmax(-offset.square().flatten(2).sum(-1) / (2 * variance), dim=1)
    clean = MEANS + (1 - sigma) * SPREAD**2 / variance * offset
    return (weight[..., None, None, None] * clean).sum(dim=1)


def _sample(scheduler: PatchScheduler, num_samples: int = 4) -> tuple[Tensor, Tensor]:
    """Sizes and statistics of Euler runs whose coarse steps lose the image's detail."""
    sigmas = _sigmas()
    generator = torch.Generator().manual_seed(1)
    path = [torch.randn(4, 1, PIXELS, PIXELS, generator=generator).double()[:num_samples]]
    decision, log = scheduler.first(num_samples), []
    for step in range(NUM_STEPS):
        decision = scheduler.decide(
            decision, path, sigmas[: step + 1], step=step, num_steps=NUM_STEPS
        )
        log.append(decision)
        z = path[-1]
        clean = _teacher_clean(z, sigmas[step])
        for scale, samples in decision.groups():
            if scale > 1:
                small = F.avg_pool2d(clean[samples], 2 * scale)
                clean[samples] = F.interpolate(small, size=(PIXELS, PIXELS), mode="bilinear")
        path.append(z + (sigmas[step + 1] - sigmas[step]) * (z - clean) / sigmas[step])
    return torch.stack([d.scale_B for d in log]), torch.stack([d.statistic_BS for d in log])


def _switches(sizes_KB: Tensor) -> int:
    """Of the sample that switches most."""
    return int((sizes_KB[1:] != sizes_KB[:-1]).sum(dim=0).max())


@pytest.mark.parametrize("tau", [1e-6, 1e-5, 3e-5, 1e-4, 5e-4, 2e-3])
def test_hold_stops_the_chatter(tau: float) -> None:
    scheduler = PatchScheduler(tau)
    assert _switches(_sample(scheduler)[0]) <= 2 * len(scheduler.sizes)


def test_without_hold_the_sizes_chatter_and_save_little() -> None:
    """The toy has the fault that ``hold`` cures: one coarse step in four, again and again."""
    free, held = PatchScheduler(1e-4, hold=1), PatchScheduler(1e-4)
    sizes_KB, _ = _sample(free)
    assert _switches(sizes_KB) > 4 * len(free.sizes)
    assert token_fraction(sizes_KB) > 0.75
    assert token_fraction(_sample(held)[0]) < 0.5


def test_token_fraction_falls_with_the_threshold() -> None:
    taus = [0.0, 1e-6, 1e-5, 3e-5, 1e-4, 5e-4, 2e-3, 1.0]
    fractions = [token_fraction(_sample(PatchScheduler(tau))[0]) for tau in taus]
    assert fractions[0] == 1.0
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[-1] == pytest.approx((8 + 42 / 16) / 50)


def test_a_mixed_batch_decides_as_its_samples_alone() -> None:
    sigmas = _sigmas()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(4, 3, 16, 16, generator=generator)
    amplitude = torch.tensor([0.0, 0.3, 1.0, 3.0]).view(4, 1, 1, 1)
    smooth = F.interpolate(noise[..., ::8, ::8], size=(16, 16), mode="bilinear")
    path = [amplitude * (smooth * math.cos(7 * s) + 0.2 * noise * math.sin(9 * s)) for s in sigmas]
    scheduler = PatchScheduler(1e-3)
    sizes_KB, _ = _follow(scheduler, path, sigmas)
    assert sizes_KB.unique().tolist() == [1, 2, 4]
    assert (sizes_KB != sizes_KB[:, :1]).any()
    for sample in range(4):
        alone_KB, _ = _follow(scheduler, [z[sample : sample + 1] for z in path], sigmas)
        assert torch.equal(alone_KB[:, 0], sizes_KB[:, sample])


def test_groups_hold_every_sample_once() -> None:
    scheduler = PatchScheduler(1.0)
    decision = replace(scheduler.first(5), scale_B=torch.tensor([4, 1, 4, 2, 1]))
    groups = [(scale, samples.tolist()) for scale, samples in decision.groups()]
    assert groups == [(1, [1, 4]), (2, [3]), (4, [0, 2])]


def test_calibrated_threshold_ends_coarse_steps_where_asked() -> None:
    """On a path that bends more and more, for the first, the middle and the last sample to stop."""
    sigmas = _sigmas(3.0)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(5, 1, 8, 8, generator=generator)
    rate = torch.linspace(3, 5, 5).view(5, 1, 1, 1)
    path = [direction * torch.exp(-rate * sigma) for sigma in sigmas]
    scheduler = PatchScheduler(0.0, min_fine_last=0, sizes=(1, 2))
    _, statistic_KBS = _follow(scheduler, path, sigmas)
    for quantile, still_coarse in ((0.1, 1), (0.5, 2), (0.9, 4)):
        tau = calibrate_tau(statistic_KBS[..., 0], 30, quantile=quantile)
        sizes_KB, _ = _follow(replace(scheduler, tau=tau), path, sigmas)
        assert int((sizes_KB[30] == 2).sum()) == still_coarse
        assert (sizes_KB[3:20] == 2).all()
        assert (sizes_KB[-4:] == 1).all()
    with pytest.raises(ConfigError, match="no statistic"):
        calibrate_tau(statistic_KBS[..., 0], 2)
    with pytest.raises(ConfigError, match="outside"):
        calibrate_tau(statistic_KBS[..., 0], 50)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tau", -1.0),
        ("rho", 1.5),
        ("order", 4),
        ("hold", 0),
        ("normalize", "none"),
        ("min_fine_first", 2),
        ("min_fine_last", -1),
        ("base_patch", 0),
        ("channels", "max"),
        ("sizes", (2, 4)),
        ("sizes", (1, 4, 2)),
    ],
)
def test_constants_that_cannot_work_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        PatchScheduler(**{"tau": 1e-3, key: value})


def test_latents_that_cannot_be_measured_are_refused() -> None:
    scheduler, sigmas = PatchScheduler(1e-3), _sigmas()[:4]
    with pytest.raises(ConfigError, match="float32"):
        scheduler.statistic([torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)] * 4, sigmas)
    with pytest.raises(ConfigError, match="falling"):
        scheduler.statistic([torch.zeros(1, 1, 8, 8)] * 4, [0.9, 0.8, 0.8, 0.7])
    with pytest.raises(ConfigError, match="8 x 8 blocks"):
        scheduler.statistic([torch.zeros(1, 1, 8, 12)] * 4, sigmas)
