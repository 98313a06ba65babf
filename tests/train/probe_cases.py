"""Steps on rows that are the same under every layout, for tests of instruments and replays."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from tools.ledger import ledger_config
from trinity.core import job
from trinity.core.batch import IGNORED_TARGET, Batch
from trinity.core.config import Config
from trinity.optim.clip import clip_gradients
from trinity.optim.groups import OptimizerSet, build_optimizers
from trinity.parallel.mesh import Meshes, layout_for
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts
from trinity.train.balancing import move_biases
from trinity.train.probes import Probes, values


class Trainer(NamedTuple):
    """What a step needs, on this rank."""

    config: Config
    model: ParallelModel
    optimizers: OptimizerSet


def make_config(overrides: Iterable[str] = (), dtype: str = "fp64") -> Config:
    """The model of the ledger, every kind of layer in fp64, with four rows a step."""
    return ledger_config(Path("unused"), dtype, ["batch.rows_per_step=4", *overrides])


def make_trainer(config: Config) -> Trainer:
    """Runs on every rank."""
    layout = layout_for(config.parallel, job.world_size())
    meshes = Meshes(layout, "cpu") if job.world_size() > 1 else None
    model = ParallelModel.build(config, meshes, torch.device("cpu"))
    optimizers = build_optimizers(model.named_parameters(), config.optim, model.group_of_axes)
    return Trainer(config, model, optimizers)


def rows_of_step(config: Config, step: int) -> Batch:
    """Random rows, with documents and tokens that predict nothing."""
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


def microbatches_of(trainer: Trainer, step: int) -> tuple[list[Batch], StepCounts]:
    """This rank's part of a step's rows."""
    config, model = trainer.config, trainer.model
    batch = rows_of_step(config, step)
    counts = StepCounts(int((batch.targets_BS != IGNORED_TARGET).sum()), len(batch.tokens_BS))
    own = Batch(*(field[model.dp_rank :: model.layout.dp] for field in batch))
    size = config.batch.microbatch_rows
    parts = [
        model.local_batch(Batch(*(field[i : i + size] for field in own)))
        for i in range(0, len(own.tokens_BS), size)
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
    load_LE = torch.zeros(len(config.model.moe_layers), config.model.num_experts)
    rows = iter(model.moe_rows())
    for stage in model.stages:
        for load_E in torch.stack([loss.load_LE for loss in stage.take_losses()]).sum(0):
            load_LE[next(rows)[0]] += load_E
    model.add_up(load_LE)
    clip_gradients(model.parameters(), torch.tensor(1.0), config.optim.grad_clip)
    if not skip:
        optimizers.step()
        move_biases(model.moe_rows(), load_LE, config.balance)
    if probes is None:
        return {}
    probes.after_update()
    return dict(values(probes.reading()))
