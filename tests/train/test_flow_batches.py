"""Batches of noisy images against numbers computed one image, patch and token at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trinity.core.batch import FlowBatch
from trinity.core.draws import Stream, generator_for
from trinity.core.errors import ConfigError
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.load_config import load_image_config
from trinity.data.image_rows import ImageRows, Placed
from trinity.models.dit import DiffusionTransformer
from trinity.models.patching import unpatchify
from trinity.nn.init import fill_normal
from trinity.train.flow_batches import TRAINING, VALIDATION, flow_batch, sigma_density
from trinity.train.streams import make_loader, next_batch, open_dataset, validation_batches

SOME_ROWS = ([1, 2, 2], [2, 1, 1, 2], [])
"""Patch scales of the images of three rows of 42 tokens: 24 are used, 40, none."""
ROW_NUMBERS = [5, 6, 11]
LABELS = (3, -1, 9, 0, 7, 2, 5)


def _config(toml: Path, *overrides: str) -> ImageRunConfig:
    return load_image_config(toml, overrides)


def _rows(config: ImageRunConfig, *, labels: Sequence[Any] = LABELS) -> ImageRows:
    generator = torch.Generator().manual_seed(1)
    shape = (config.model.channels, *config.images.extent())
    conditions = iter(labels)
    rows = [
        [
            Placed(0, 0, scale, next(conditions), torch.rand(shape, generator=generator) * 2 - 1)
            for scale in scales
        ]
        for scales in SOME_ROWS
    ]
    return ImageRows(rows, ROW_NUMBERS)


def _fraction(seed: int, purpose: int, draw: int, stream: Stream) -> float:
    return 1.0 - generator_for(seed, purpose, draw, stream).random()


def _sigma(config: ImageRunConfig, fraction: float, scale: int) -> float:
    """By bisection of the normal distribution's integral, then the shift in the logit."""
    flow = config.flow
    logit = math.log(fraction / (1 - fraction))
    if flow.density == "logit_normal":
        low, high = -40.0, 40.0
        for _ in range(200):
            middle = (low + high) / 2
            below = 0.5 * math.erfc(-middle / math.sqrt(2))
            low, high = (middle, high) if below < fraction else (low, middle)
        logit = flow.logit_mean + flow.logit_std * low
    logit += math.log(flow.shift) + math.log2(scale) * math.log(flow.coarse_shift)
    return 1 / (1 + math.exp(-logit))


def _weight(weighting: str, sigma: float) -> float:
    if weighting == "sigma_sqrt":
        return 1 / sigma**2
    if weighting == "cosmap":
        return 2 / (math.pi * (sigma**2 + (1 - sigma) ** 2))
    return 1.0


def _check_image(
    batch: FlowBatch, row: int, number: int, placed: Placed, config: ImageRunConfig, first: int
) -> int:
    """Everything that one image has in a batch; returns the token after its last."""
    model, flow = config.model, config.flow
    draw = ROW_NUMBERS[row] * config.images_per_row + number
    x = placed.pixels.double().numpy()
    noise = generator_for(config.seed, TRAINING, draw, Stream.NOISE)
    eps = noise.standard_normal(x.shape, dtype=np.float32).astype(np.float64)
    sigma = _sigma(config, _fraction(config.seed, TRAINING, draw, Stream.SIGMA), placed.scale)
    assert float(batch.sigma_BN[row, number]) == pytest.approx(sigma, rel=1e-6)
    assert int(batch.counts_BN[row, number]) == 1
    z, v = (1 - sigma) * x + sigma * eps, eps - x
    edge, depth = model.patch_size * placed.scale, model.patch_frames
    video = x.ndim == 4
    grid = [(x.shape[1] // depth) if video else 1, x.shape[-2] // edge, x.shape[-1] // edge]
    token = first
    for t, i, j in itertools.product(*map(range, grid)):
        cut = (slice(i * edge, (i + 1) * edge), slice(j * edge, (j + 1) * edge))
        inside = (slice(None), *([slice(t * depth, (t + 1) * depth)] if video else []), *cut)
        for whole, patches_BSP in ((z, batch.patches_BSP), (v, batch.targets_BSP)):
            values = whole[inside].reshape(-1)
            stored = patches_BSP[row, token].double().numpy()
            np.testing.assert_allclose(stored[: len(values)], values, rtol=1e-5, atol=1e-5)
            assert not stored[len(values) :].any()
        middle = [placed.scale * k + (placed.scale - 1) / 2 for k in (i, j)]
        at = [t, *middle] if model.num_axes == 3 else middle
        assert batch.coordinates_BSA[row, token].tolist() == at
        assert model.patch_scales[int(batch.scale_BS[row, token])] == placed.scale
        assert int(batch.document_ids_BS[row, token]) == number
        assert float(batch.share_BS[row, token]) == pytest.approx(1 / x.size)
        weight = _weight(flow.weighting, sigma) / x.size
        assert float(batch.weight_BS[row, token]) == pytest.approx(weight, rel=1e-5)
        token += 1
    kept = _fraction(config.seed, TRAINING, draw, Stream.CONDITION) > flow.condition_dropout
    _check_condition(batch.condition[row, number], placed.condition, kept, config)
    return token


def _check_condition(
    condition: Tensor, given: int | Tensor, kept: bool, config: ImageRunConfig
) -> None:
    if config.model.condition == "embedding":
        assert isinstance(given, Tensor)
        assert torch.equal(condition, given if kept else torch.zeros_like(given))
    elif config.model.condition == "class":
        known = kept and given != -1
        assert int(condition) == (given if known else config.model.num_classes)
    else:
        assert int(condition) == 0


def _check(batch: FlowBatch, rows: ImageRows, config: ImageRunConfig) -> None:
    num_images, num_tokens = config.images_per_row, config.batch.sequence_length
    for row, images in enumerate(rows.rows):
        first = 0
        for number, placed in enumerate(images):
            first = _check_image(batch, row, number, placed, config, first)
        padding = slice(first, num_tokens)
        for field in batch[:6]:  # patches, velocities, shares, weights, scales, coordinates
            assert not field[row, padding].any()
        assert (batch.document_ids_BS[row, padding] == num_images).all()
        unused = slice(len(images), num_images)
        assert not batch.counts_BN[row, unused].any()
        none = config.model.num_classes if config.model.condition == "class" else 0
        assert (batch.condition[row, unused] == none).all()
    assert int(batch.num_counted) == sum(len(images) for images in rows.rows)
    assert batch.patches_BSP.shape == (3, num_tokens, config.model.patch_values[-1])
    assert batch.sigma_BN.shape == (3, num_images)


@pytest.mark.parametrize(
    "overrides",
    [
        ["flow.condition_dropout=0.5"],
        ["flow.density=uniform", "flow.weighting=cosmap", "flow.shift=3.0"],
        ["flow.logit_mean=-0.7", "flow.logit_std=1.7", "flow.weighting=sigma_sqrt"],
        ["model.channels=3", "images.width=4", "model.num_axes=3", "flow.condition_dropout=0.0"],
        ["model.condition=none", "model.num_classes=0", "seed=11"],
    ],
)
def test_every_number_of_a_batch(tiny_images_toml: Path, overrides: list[str]) -> None:
    """Two sizes of patches, an image without a class, padding, and a row that holds nothing."""
    config = _config(tiny_images_toml, *overrides)
    rows = _rows(config)
    _check(flow_batch(rows, config), rows, config)


def _video_overrides(path: Path) -> list[str]:
    return [
        f"images.sources=[{{name='clips', format='latents', path='{path}'}}]",
        "images.frames=4",
        "images.height=4",
        "images.width=8",
        "images.held_out_fraction=0.3",
        "model.channels=2",
        "model.num_axes=3",
        "model.patch_frames=2",
        "model.condition=embedding",
        "model.num_classes=0",
        "model.embedding_width=3",
        "flow.condition_dropout=0.4",
    ]


def test_every_number_of_a_batch_of_videos_with_embeddings(tiny_images_toml: Path) -> None:
    config = _config(tiny_images_toml, *_video_overrides(Path("nowhere")))
    vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    rows = _rows(config, labels=vectors)
    _check(flow_batch(rows, config), rows, config)


def test_dropped_conditions_are_the_share_asked_for(tiny_images_toml: Path) -> None:
    shares = {}
    for dropout in (0.0, 0.3, 1.0):
        config = _config(tiny_images_toml, f"flow.condition_dropout={dropout}")
        zero = torch.zeros(1, 8, 8)
        rows = ImageRows([[Placed(0, 0, 2, 4, zero)] * 10] * 60, list(range(60)))
        condition_BN = flow_batch(rows, config).condition
        assert set(condition_BN.unique().tolist()) <= {4, 10}
        shares[dropout] = float((condition_BN == 10).double().mean())
    assert (shares[0.0], shares[1.0]) == (0.0, 1.0)
    assert abs(shares[0.3] - 0.3) < 3 * math.sqrt(0.21 / 600)


def _by_image(batch: FlowBatch) -> dict[bytes, tuple[float, int]]:
    """Sigma and condition of every image, by the patches that it was given."""
    found = {}
    for row in range(len(batch[0])):
        for number in range(int(batch.counts_BN[row].sum())):
            own = batch.document_ids_BS[row] == number
            key = b"".join(
                field[row, own].numpy().tobytes() for field in (batch.patches_BSP, batch.scale_BS)
            )
            known = (float(batch.sigma_BN[row, number]), int(batch.condition[row, number]))
            assert key not in found
            found[key] = known
    return found


@pytest.mark.parametrize("lanes", [2, 3])
def test_an_image_gets_the_same_noise_from_whoever_reads_it(
    tiny_images_toml: Path, lanes: int
) -> None:
    """Two processes with lanes of their own, or rows dealt out; steps of other sizes; skipped
    steps; rows one by one."""
    config = _config(tiny_images_toml, f"images.lanes={lanes}")
    dataset = open_dataset(config)

    def loader(rank: int = 0, world_size: int = 1) -> Any:
        return make_loader(config, dataset, rank=rank, world_size=world_size)

    alone = loader()
    whole = _by_image(next_batch(config, alone, 12))
    assert len(whole) > 40
    in_steps, ranks = loader(), [loader(rank, 2) for rank in range(2)]
    assert (ranks[0].own_lanes is None) == (lanes == 3)
    one_by_one = loader()
    parts: dict[str, dict[bytes, tuple[float, int]]] = {"steps": {}, "ranks": {}, "rows": {}}
    for num_rows in (4, 8):
        parts["steps"] |= _by_image(next_batch(config, in_steps, num_rows))
        for rank in ranks:
            parts["ranks"] |= _by_image(next_batch(config, rank, num_rows))
        for _ in range(num_rows):
            parts["rows"] |= _by_image(next_batch(config, one_by_one, 1))
    assert all(part == whole for part in parts.values())
    skipping = loader()
    skipping.skip_rows(0, 2 * lanes)
    later = _by_image(next_batch(config, skipping, 12 - 2 * lanes))
    assert later.items() <= whole.items()


def test_the_same_picture_gets_other_noise_elsewhere(tiny_images_toml: Path) -> None:
    """In another place of the row, another row, another run; and when it validates."""
    config = _config(tiny_images_toml, "flow.condition_dropout=0.5")
    picture = Placed(0, 0, 2, 4, torch.zeros(1, 8, 8))
    rows = ImageRows([[picture] * 10] * 4, [0, 1, 2, 30])
    other_seed = _config(tiny_images_toml, "flow.condition_dropout=0.5", "seed=8")
    batches = [
        flow_batch(rows, config, purpose=TRAINING),
        flow_batch(rows, config, purpose=VALIDATION),
        flow_batch(rows, other_seed, purpose=TRAINING),
    ]
    sigmas = torch.stack([batch.sigma_BN for batch in batches]).flatten()
    assert len(sigmas.unique()) == 3 * 40
    # Unit noise where the picture is black: what comes out is sigma times eps.
    noise = torch.stack([b.targets_BSP[:, :40].reshape(40, 4, 16) for b in batches]).flatten(0, 1)
    noise = noise.flatten(1).double()
    assert abs(float(noise.std()) - 1) < 0.03
    correlations = torch.corrcoef(noise).fill_diagonal_(0).abs()
    assert correlations.max() < 0.65  # 64 numbers each
    dropped = torch.stack([batch.condition == 10 for batch in batches]).flatten(1).double()
    assert torch.corrcoef(dropped).fill_diagonal_(0).abs().max() < 0.6


def test_larger_patches_are_trained_at_more_noise(tiny_images_toml: Path) -> None:
    """``coarse_shift`` multiplies the odds of sigma for every doubling, ``shift`` for all sizes."""
    scales = "model.patch_scales=[1,2,4]"
    plain = _config(tiny_images_toml, scales, "flow.coarse_shift=1.0")
    config = _config(tiny_images_toml, scales, "flow.coarse_shift=2.5", "flow.shift=1.5")
    fractions = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    before = sigma_density(plain, 0).quantile(fractions)
    assert float(before[2]) == pytest.approx(0.5)
    for index, doublings in enumerate((0, 1, 2)):
        assert torch.equal(sigma_density(plain, index).quantile(fractions), before)
        after = sigma_density(config, index).quantile(fractions)
        odds = (after / (1 - after)) / (before / (1 - before))
        torch.testing.assert_close(odds, torch.full_like(odds, 1.5 * 2.5**doublings))
    rows = ImageRows(
        [[Placed(0, 0, s, 0, torch.zeros(1, 8, 8)) for s in (1, 2, 4)]] * 300, list(range(300))
    )
    sigma_BN = flow_batch(rows, config).sigma_BN
    for index in range(3):
        below = sigma_density(config, index).quantile(fractions)
        shares = torch.stack([(sigma_BN[:, index] <= q).double().mean() for q in below])
        assert (shares - fractions).abs().max() < 3 * math.sqrt(0.25 / 300)


def test_a_microbatch_is_some_rows_of_a_batch(tiny_images_toml: Path) -> None:
    """Cut by rows, by positions among the ranks that share rows, or without anything to predict."""
    config = _config(tiny_images_toml)
    batch = flow_batch(_rows(config), config)
    parts = [batch.part_of_rows(part, 3) for part in range(3)]
    for number, name in enumerate(batch._fields):
        fields = [part[number] for part in parts]
        if number < 5:
            assert torch.equal(torch.cat(fields, 1), batch[number]), name
        elif name != "counts_BN":
            assert all(torch.equal(field, batch[number]) for field in fields), name
    assert [int(part.num_counted) for part in parts] == [int(batch.num_counted), 0, 0]
    nothing = batch.without_targets()
    assert int(nothing.num_counted) == 0
    assert not nothing.share_BS.any()
    assert not nothing.weight_BS.any()
    assert torch.equal(nothing.patches_BSP, batch.patches_BSP)


def test_validation_is_the_same_every_time_and_has_full_batches(
    tiny_images_toml: Path, tmp_path: Path
) -> None:
    """A pipeline needs all microbatches alike: a source that ends early is filled with nothing."""
    latents = torch.randn(25, 2, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    embeddings = torch.randn(25, 3, generator=torch.Generator().manual_seed(3))
    path = tmp_path / "clips.safetensors"
    save_file({"latents": latents, "embeddings": embeddings}, path)
    config = _config(tiny_images_toml, *_video_overrides(path), "train.validation_rows=16")
    dataset = open_dataset(config)
    first, again = (validation_batches(config, dataset)["clips"] for _ in range(2))
    num_held_out = dataset.num_images("held-out")
    assert num_held_out == 9  # in four rows and a half, and these in two batches and a half
    assert (config.batch.sequence_length // config.tokens_of_image, len(first)) == (2, 3)
    assert sum(int(batch.num_counted) for batch in first) == num_held_out
    for batch, other in zip(first, again, strict=True):
        assert len(batch[0]) == config.batch.microbatch_rows
        assert all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))
        assert set(batch.scale_BS.unique().tolist()) == {0}


def test_a_row_of_one_image_and_padding_has_two_places(tiny_images_toml: Path) -> None:
    """With one place, the model would take all of the row for the image."""
    one_scale = ["model.patch_scales=[1]", "images.coarse_shares=[]"]
    for length, places in ((16, 1), (17, 2), (31, 2), (32, 2), (48, 3), (50, 3)):
        config = _config(tiny_images_toml, *one_scale, f"batch.sequence_length={length}")
        assert config.images_per_row == places, length
    assert _config(tiny_images_toml).images_per_row == 10


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.patch_scales=[1]", "images.coarse_shares=[]", "batch.sequence_length=19"],
        ["model.patch_scales=[1]", "images.coarse_shares=[]", "batch.sequence_length=16"],
    ],
)
def test_training_sees_what_a_sampler_will(tiny_images_toml: Path, overrides: list[str]) -> None:
    """The loss of packed rows is the error of the velocities that the model predicts one by one."""
    config = _config(tiny_images_toml, *overrides, "model.layer_pattern=W-SE*E")
    model = DiffusionTransformer.initialized(config.model, seed=1)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        fill_normal(parameter.data, 0.2, name)
        parameter.data.add_(before)
    batch = next_batch(config, make_loader(config, open_dataset(config)), 3)
    assert isinstance(batch, FlowBatch)
    given = dict(zip(batch._fields[1:], batch[1:], strict=True))
    sums = model.objective(model.run_blocks(model.enter(batch[0], given), given), given, config)
    error, num_tokens = 0.0, 0
    for row, number in batch.counts_BN.nonzero().tolist():
        own = batch.document_ids_BS[row] == number
        scale = config.model.patch_scales[int(batch.scale_BS[row, own][0])]
        size, num_values = 2 * scale, (2 * scale) ** 2
        z, v = (
            unpatchify(field[row, own, :num_values].unsqueeze(0), (8, 8), size)
            for field in (batch.patches_BSP, batch.targets_BSP)
        )
        condition = batch.condition[row, number].unsqueeze(0)
        predicted = model(z, batch.sigma_BN[row, number], condition, scale=scale)
        error += float((predicted - v).detach().square().mean())
        num_tokens += int(own.sum())
    assert float(sums.error) == pytest.approx(error, rel=1e-4)
    assert sums.load_LE.sum((1, 2)).tolist() == [2 * num_tokens] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.patch_frames=2"], r"frames=0 \(an image counts as one\) is no multiple"),
        (["images.frames=3", "model.patch_frames=2", "model.num_axes=3"], "frames=3 .* multiple"),
        (["images.frames=4"], "num_axes=2, which knows no time"),
        (["flow.logit_mean=inf"], "logit_mean.*finite"),
    ],
)
def test_shapes_that_cannot_be_are_refused(
    tiny_images_toml: Path, overrides: list[str], message: str
) -> None:
    latents = "images.sources=[{name='clips', format='latents', path='x'}]"
    with pytest.raises(ConfigError, match=message):
        _config(tiny_images_toml, latents, *overrides)
