"""Images at random noise levels, as the rows of patches that a diffusion transformer is given.

Whatever is drawn for an image is a pure function of the run's seed and the image's place in the
stream (row and number in the row): it does not depend on the step, the number of processes or what
else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.batch import FlowBatch
from trinity.core.draws import Stream, normal_by_row, uniform_by_row
from trinity.core.image_run_config import ImageRunConfig
from trinity.data.image_rows import ImageRows, Placed
from trinity.models.flow import SigmaDensity, interpolate, loss_weight, velocity_target
from trinity.models.patching import patch_centres, patchify

TRAINING, VALIDATION = 0, 1
"""What rows are for: their draws have nothing to do with one another."""


class _Slot(NamedTuple):
    """An image and where it goes."""

    placed: Placed
    row: int
    """Of the batch."""
    number: int
    """Of the image in its row."""
    draw: int
    """What its random numbers are drawn by."""
    first: int
    """Its first token in the row."""


def sigma_density(config: ImageRunConfig, scale_index: int) -> SigmaDensity:
    """Where on the path images of a patch scale are trained."""
    flow = config.flow
    doublings = torch.tensor(float(config.model.patch_scales[scale_index])).log2().item()
    shift = flow.shift * flow.coarse_shift**doublings
    return SigmaDensity(flow.density, flow.logit_mean, flow.logit_std, shift)


def flow_batch(rows: ImageRows, config: ImageRunConfig, *, purpose: int = TRAINING) -> FlowBatch:
    """Noise the images of some rows and cut them into patches."""
    model, num_images = config.model, config.images_per_row
    shape = (len(rows.rows), config.batch.sequence_length)
    num_values = model.patch_values[-1]
    condition: Tensor = torch.full((shape[0], num_images), model.num_classes, dtype=torch.int64)
    if model.condition == "embedding":
        condition = torch.zeros(shape[0], num_images, model.embedding_width)
    batch = FlowBatch(
        patches_BSP=torch.zeros(*shape, num_values),
        targets_BSP=torch.zeros(*shape, num_values),
        share_BS=torch.zeros(shape),
        weight_BS=torch.zeros(shape),
        scale_BS=torch.zeros(shape, dtype=torch.int64),
        coordinates_BSA=torch.zeros(*shape, model.num_axes),
        document_ids_BS=torch.full(shape, num_images, dtype=torch.int32),
        sigma_BN=torch.ones(shape[0], num_images),
        condition=condition,
        counts_BN=torch.zeros(shape[0], num_images, dtype=torch.int64),
    )
    slots = _slots(rows, config)
    for index, scale in enumerate(model.patch_scales):
        of_scale = [slot for slot in slots if slot.placed.scale == scale]
        if of_scale:
            _fill(batch, of_scale, index, config, purpose)
    return batch


def _slots(rows: ImageRows, config: ImageRunConfig) -> list[_Slot]:
    slots = []
    for place, (row, images) in enumerate(zip(rows.row_numbers, rows.rows, strict=True)):
        first = 0
        for number, placed in enumerate(images):
            draw = row * config.images_per_row + number
            slots.append(_Slot(placed, place, number, draw, first))
            first += config.tokens_of_image // placed.scale**2
    return slots


def _fill(
    batch: FlowBatch,
    slots: Sequence[_Slot],
    index: int,
    config: ImageRunConfig,
    purpose: int,
) -> None:
    """Write the images of one patch scale into their places."""
    model, draws = config.model, [slot.draw for slot in slots]
    scale = model.patch_scales[index]
    size, frames = model.patch_size * scale, model.patch_frames
    x = torch.stack([slot.placed.pixels for slot in slots])
    eps = normal_by_row(config.seed, purpose, draws, x.shape[1:], Stream.NOISE)
    fractions = uniform_by_row(config.seed, purpose, draws, Stream.SIGMA)
    sigma_I = sigma_density(config, index).quantile(fractions).float()
    z, v = interpolate(x, eps, sigma_I), velocity_target(x, eps)
    patches_ISP, targets_ISP = (patchify(t, size, frames=frames) for t in (z, v))
    row_I = torch.tensor([slot.row for slot in slots])
    number_I = torch.tensor([slot.number for slot in slots])
    first_I = torch.tensor([slot.first for slot in slots])
    at = (row_I[:, None], first_I[:, None] + torch.arange(patches_ISP.shape[1]))
    num_values = patches_ISP.shape[-1]
    batch.patches_BSP[(*at, slice(num_values))] = patches_ISP
    batch.targets_BSP[(*at, slice(num_values))] = targets_ISP
    share = 1.0 / x[0].numel()
    batch.share_BS[at] = share
    batch.weight_BS[at] = share * loss_weight(sigma_I, config.flow.weighting)[:, None]
    batch.scale_BS[at] = index
    grid = (x.shape[-2] // size, x.shape[-1] // size)
    if model.num_axes == 3:
        grid = (x.shape[2] // frames if x.ndim == 5 else 1, *grid)
    batch.coordinates_BSA[at] = patch_centres(grid, scale)
    batch.document_ids_BS[at] = number_I[:, None].int()
    batch.sigma_BN[row_I, number_I] = sigma_I
    batch.counts_BN[row_I, number_I] = 1
    if model.condition != "none":
        draw_I = uniform_by_row(config.seed, purpose, draws, Stream.CONDITION)
        given = torch.stack([torch.as_tensor(slot.placed.condition) for slot in slots])
        kept_I = draw_I > config.flow.condition_dropout
        kept = kept_I.reshape(-1, *[1] * (given.ndim - 1))
        none = 0
        if model.condition == "class":
            none, kept = model.num_classes, kept & (given >= 0)  # -1 is an image without a class
        batch.condition[row_I, number_I] = given.to(batch.condition.dtype).where(kept, none)
