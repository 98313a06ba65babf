"""Steps on rows that are the same under every layout, for tests of instruments and replays."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from tools.ledger import ledger_config
from trinity.core import job
from trinity.core.batch import IGNORED_TARGET, AnyBatch, Batch
from trinity.core.config import Config, RunConfig
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.sharding import local_tensor
from trinity.data.image_rows import ImageRows, Placed
from trinity.models.backbone import load_shape
from trinity.nn.init import fill_normal
from trinity.optim.clip import clip_gradients
from trinity.optim.groups import OptimizerSet, build_optimizers
from trinity.parallel.mesh import Meshes, layout_for
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts
from trinity.train.balancing import move_biases
from trinity.train.flow_batches import flow_batch
from trinity.train.probes import Probes, values

SCALES = ([2], [2, 1], [2, 2, 2, 2], [1, 2])
"""Patch scales of the images of a row: 16 to 80 of 96 tokens."""


class Trainer(NamedTuple):
    """What a step needs, on this rank."""

    config: RunConfig
    model: ParallelModel
    optimizers: OptimizerSet


def make_config(overrides: Iterable[str] = (), dtype: str = "fp64") -> Config:
    """The model of the ledger, every kind of layer in fp64, with four rows a step."""
    config = ledger_config(Path("unused"), dtype, ["batch.rows_per_step=4", *overrides])
    assert isinstance(config, Config)
    return config


def make_image_config(overrides: Iterable[str] = (), dtype: str = "fp64") -> ImageRunConfig:
    """The same for the diffusion transformer of the ledger."""
    overrides = ["batch.rows_per_step=4", *overrides]
    config = ledger_config(Path("unused"), dtype, overrides, dit=True)
    assert isinstance(config, ImageRunConfig)
    return config


def make_trainer(config: RunConfig) -> Trainer:
    """Runs on every rank. All weights of a diffusion transformer are moved from where they start,
    which is the identity before a head of zeros."""
    layout = layout_for(config.parallel, job.world_size())
    meshes = Meshes(layout, "cpu") if job.world_size() > 1 else None
    model = ParallelModel.build(config, meshes, torch.device("cpu"))
    if config.model.is_image:
        for name, parameter in model.named_parameters():
            before = local_tensor(parameter).detach().clone()
            fill_normal(parameter.data, 0.2, f"stir/{name}")
            local_tensor(parameter).data.add_(before)
    optimizers = build_optimizers(model.named_parameters(), config.optim, model.group_of_axes)
    return Trainer(config, model, optimizers)


def images_of_step(config: ImageRunConfig, step: int) -> AnyBatch:
    """Rows of random images of both patch sizes, with padding between few and many tokens."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.model.channels, config.images.height, config.images.width)
    large = len(config.model.patch_scales) > 1
    rows = [
        [
            Placed(number, 0, scale, number % 10, torch.randn(shape, generator=generator))
            for number, scale in enumerate(SCALES[row % len(SCALES)] if large else [1])
        ]
        for row in range(config.batch.rows_per_step)
    ]
    numbers = [len(rows) * step + row for row in range(len(rows))]
    batch = flow_batch(ImageRows(rows, numbers), config)
    # What fills a row up must count for nothing, whatever it is.
    noise_BSP = torch.randn(batch.patches_BSP.shape, generator=generator)
    filled_BS1 = (batch.share_BS == 0).unsqueeze(-1)
    return batch._replace(patches_BSP=noise_BSP.where(filled_BS1, batch.patches_BSP))


def rows_of_step(config: RunConfig, step: int) -> AnyBatch:
    """Random rows, with documents and tokens that predict nothing."""
    if isinstance(config, ImageRunConfig):
        return images_of_step(config, step)
    assert isinstance(config, Config)
    generator = torch.Generator().manual_seed(step)
    shape = (config.batch.rows_per_step, config.batch.sequence_length)
    tokens_BS = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    targets_BS = torch.roll(tokens_BS, -1, dims=1)
    documents_BS = torch.zeros(shape, dtype=torch.int32)
    for row in range(shape[0]):
        cut = 1 + (4 + 6 * row) % (shape[1] - 2)
        documents_BS[row, cut:] += 1
        targets_BS[row, cut - 1] = IGNORED_TARGET
        targets_BS[row, row :: shape[0] + 3] = IGNORED_TARGET
    return Batch(tokens_BS, targets_BS, documents_BS)


def microbatches_of(trainer: Trainer, step: int) -> tuple[list[AnyBatch], StepCounts]:
    """This rank's part of a step's rows."""
    config, model = trainer.config, trainer.model
    batch = rows_of_step(config, step)
    counts = StepCounts(int(batch.num_counted), len(batch[0]))
    own = [field[model.dp_rank :: model.layout.dp] for field in batch]
    size = config.batch.microbatch_rows
    parts = [
        model.local_batch(type(batch)(*(field[i : i + size] for field in own)))
        for i in range(0, len(own[0]), size)
    ]
    return parts, counts


def train(
    trainer: Trainer, step: int, probes: Probes | None = None, *, skip: bool = False
) -> dict[str, object]:
    """One step, measured if there is something to measure with; returns the reading."""
    config, model, optimizers = trainer
    microbatches, counts = microbatches_of(trainer, step)
    optimizers.zero_grad()
    with nullcontext() if probes is None else probes.measuring():
        model.pipeline.forward_backward(microbatches, counts)
    if probes is not None:
        probes.before_update()
    load = torch.zeros(len(config.model.moe_layers), *load_shape(config.model))
    rows = iter(model.moe_rows())
    for stage in model.stages:
        for load_E in torch.stack([loss.load_LE for loss in stage.take_losses()]).sum(0):
            load[next(rows)[0]] += load_E
    model.add_up(load)
    load_LE = load.sum(1) if load.ndim == 3 else load
    clip_gradients(model.parameters(), torch.tensor(1.0), config.optim.grad_clip)
    if not skip:
        optimizers.step()
        move_biases(model.moe_rows(), load_LE, config.balance)
    if probes is None:
        return {}
    probes.after_update()
    return dict(values(probes.reading()))
