"""A run: its directory, everything it trains, and what a checkpoint of it holds."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.ckpt.background import BackgroundSaver
from trinity.ckpt.ema import WeightAverage
from trinity.ckpt.load import AVERAGE_PREFIX
from trinity.ckpt.store import (
    VerifiedCheckpoint,
    checkpoint_path,
    clean_stale,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stored_names,
)
from trinity.core import job
from trinity.core.batch import AnyBatch
from trinity.core.config import BatchConfig, RunConfig
from trinity.core.errors import CheckpointError, ConfigError, DataError
from trinity.core.load_config import dump_config, load_any_config
from trinity.core.run_files import CONFIG_FILE, DONE_FILE, RECORD_FILE
from trinity.core.runtime import allow_many_files
from trinity.core.sharding import local_tensor
from trinity.data.build import Dataset
from trinity.optim.groups import OptimizerSet, build_optimizers
from trinity.optim.schedule import lr_factor, rows_at_step, rows_before_step
from trinity.parallel.mesh import Meshes, check_layout, layout_for
from trinity.parallel.model import ParallelModel
from trinity.parallel.precision import leave_fp8
from trinity.train.interventions import read_interventions
from trinity.train.stability import Judge
from trinity.train.streams import (
    AnyDataset,
    AnyLoader,
    make_loader,
    next_batch,
    shared_dataset,
    validation_batches,
)
from trinity.train.watch import Watch

TOKENIZER_DIR = "tokenizer"


@dataclass
class Run:
    """The moving parts of a training run on this process."""

    config: RunConfig
    directory: Path
    device: torch.device
    dataset: AnyDataset
    model: ParallelModel
    optimizers: OptimizerSet
    loader: AnyLoader
    validation: dict[str, list[AnyBatch]]
    judge: Judge
    """Judges steps before they are applied."""
    watch: Watch
    """Judges the run by its steps."""
    average: WeightAverage | None
    """Of the weights, where the configuration asks for one."""
    step: int = 0
    num_tokens_seen: int = 0
    saved: Path | None = None
    """Checkpoint of the current step, once there is one; a saver may still be writing it."""
    saver: BackgroundSaver | None = None
    """Writes checkpoints while training goes on; None writes them at once."""
    before_publish: Callable[[], None] | None = None
    """Called on the first rank before a checkpoint gets its name; may refuse it."""
    warnings: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run's state, by a name that is stable across code and layout."""
        named: dict[str, Tensor] = {}
        named |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
        named |= {f"optim.{name}": t for name, t in self.optimizers.state_dict().items()}
        named |= {f"data.{name}": t for name, t in self._loader_tensors().items()}
        named |= {f"judge.{name}": t for name, t in self.judge.state_dict().items()}
        if self.average is not None:
            named |= {f"{AVERAGE_PREFIX}{name}": t for name, t in self.average.tensors.items()}
        named["rng.cpu"] = torch.get_rng_state()
        return named

    def describe_rank(self) -> str:
        """The layout, and what this rank holds of the model."""
        num_parameters = sum(local_tensor(p).numel() for p in self.model.parameters())
        return (
            f"layout {self.model.layout}, {job.world_size()} ranks; this one holds "
            f"{num_parameters:,} parameters and {self.optimizers.state_bytes() / 2**20:,.1f} MiB "
            "of optimizer state"
        )

    def _loader_tensors(self) -> dict[str, Tensor]:
        """The loader's state; sharded where each data-parallel rank has lanes of its own."""
        tensors = {name: torch.from_numpy(a) for name, a in self.loader.state().items()}
        if self.loader.own_lanes is None:
            return tensors
        return {
            name: t if name == "next_row" else self.model.sharded_over_data(t)
            for name, t in tensors.items()
        }

    def next_microbatches(self) -> list[AnyBatch]:
        """This rank's rows of the next step, split; also sets the step's learning rates."""
        config = self.config
        factor = lr_factor(
            self.step,
            shape=config.schedule.shape,
            warmup_steps=config.schedule.warmup_steps,
            num_steps=config.train.num_steps,
            decay_steps=config.schedule.decay_steps,
            final_fraction=config.schedule.final_fraction,
            decay_shape=config.schedule.decay_shape,
        )
        self.optimizers.set_lr(factor)
        num_rows = rows_at_step(self.step, config.batch.rows_per_step, config.batch.ramp)
        batch = next_batch(config, self.loader, num_rows)
        size = config.batch.microbatch_rows
        return [
            self.model.local_batch(type(batch)(*(field[i : i + size] for field in batch)))
            for i in range(0, len(batch[0]), size)
        ]

    def save(self) -> Path:
        """Checkpoint the current step, unless that is done; see :mod:`trinity.ckpt.store`."""
        if self.saved is not None:
            return self.saved
        keep = self.config.checkpoint
        save = save_checkpoint if self.saver is None else self.saver.save
        save(
            self.directory,
            self.step,
            self.tensors(),
            self.meta(),
            keep_last=keep.keep_last,
            keep_every_steps=keep.keep_every_steps,
            before_publish=self.before_publish,
        )
        self.saved = checkpoint_path(self.directory, self.step)
        return self.saved

    def meta(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "step": self.step,
            "num_tokens_seen": self.num_tokens_seen,
            "config_sha256": self.config.sha256(),
            "data_fingerprint": self.dataset.fingerprint,
            "watch": self.watch.state(),
        }

    def follow_weights(self, accept: Tensor) -> None:
        """Take the weights after the next step into their average, if it was accepted."""
        if self.average is not None:
            self.average.update(self.step + 1, accept)

    def rows_of_step(self, step: int) -> list[int]:
        """Rows of the global stream that step ``step``, counted from 1, trains on."""
        return rows_of_step(self.loader, self.config.batch, step)

    def advance(self, num_tokens: int) -> None:
        """Count a step that was taken."""
        self.step += 1
        self.num_tokens_seen += num_tokens
        self.saved = None

    def restore(self) -> None:
        """Continue from the newest checkpoint that verifies."""
        found, rejected = find_checkpoint(self.directory)
        if found is None and rejected:
            raise CheckpointError(f"{self.directory} holds no usable checkpoint: {rejected[0]}")
        if found is None:
            return
        self.warnings += rejected
        self.restore_from(found)

    def restore_from(self, found: VerifiedCheckpoint) -> None:
        """Continue from a checkpoint of this run."""
        self._check_average(found.path)
        self.optimizers.init_state()
        tensors = self.tensors()
        meta = load_checkpoint(found, tensors)
        if meta["data_fingerprint"] != self.dataset.fingerprint:
            raise CheckpointError(
                f"{found.path}: saved with data fingerprint {meta['data_fingerprint']}, but the "
                f"sources now give {self.dataset.fingerprint}; bring the old sources back or start "
                "anew"
            )
        self.adopt(tensors, meta)
        self.saved = found.path

    def _check_average(self, checkpoint: Path) -> None:
        holds = any(name.startswith(AVERAGE_PREFIX) for name in stored_names(checkpoint))
        if holds != (self.average is not None):
            raise CheckpointError(
                f"ema.decay={self.config.ema.decay}, but {checkpoint} holds "
                f"{'an' if holds else 'no'} average of the weights; bring the run's own ema.decay "
                "back, or start a new run"
            )

    def adopt(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Continue from a state that was just written into this run's own :meth:`tensors`."""
        # Parameters, buffers, optimizer state and the judge's memory are where they belong.
        self.loader.load_state(
            {
                name: local_tensor(t).cpu().numpy()
                for name, t in _with_prefix(tensors, "data.").items()
            }
        )
        torch.set_rng_state(tensors["rng.cpu"])
        self.step = int(meta["step"])
        self.num_tokens_seen = int(meta["num_tokens_seen"])
        self.watch.load_state(meta["watch"])
        self.saved = None

    def keep_config(self) -> None:
        """Make the saved configuration the effective one; what held until now is kept beside it.

        The run is no longer done. For the first process.
        """
        path, text = self.directory / CONFIG_FILE, dump_config(self.config)
        if path.read_text(encoding="utf-8") != text:
            path.rename(self.directory / f"config.until-step-{self.step}.toml")
            path.write_text(text, encoding="utf-8")
        (self.directory / DONE_FILE).unlink(missing_ok=True)


def rows_of_step(loader: AnyLoader, batch: BatchConfig, step: int) -> list[int]:
    """Rows of the global stream that step ``step``, counted from 1, trains on."""
    num_before = rows_before_step(step - 1, batch.rows_per_step, batch.ramp)
    return loader.rows_after(num_before, rows_at_step(step - 1, batch.rows_per_step, batch.ramp))


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def open_run(config: RunConfig, directory: Path, device: torch.device, *, resume: bool) -> Run:
    """Build data, model and optimizers for ``directory``, and restore its state if asked to.

    Every process of the job calls it.
    """
    layout = layout_for(config.parallel, job.world_size())
    check_layout(config, layout)
    if job.is_first():
        clean_stale(directory)
    torch.manual_seed(config.seed)
    allow_many_files()
    dataset = shared_dataset(config)
    meshes = Meshes(layout, device.type) if job.world_size() > 1 else None
    model = ParallelModel.build(config, meshes, device)
    validation = validation_batches(config, dataset)
    if config.train.validate_every_steps and not validation:
        what, table = ("image", "images") if config.model.is_image else ("document", "data")
        raise DataError(
            f"there is no held-out {what} to validate on; raise {table}.held_out_fraction, or set "
            "train.validate_every_steps=0"
        )
    run = Run(
        config=config,
        directory=directory,
        device=device,
        dataset=dataset,
        model=model,
        optimizers=build_optimizers(model.named_parameters(), config.optim, model.group_of_axes),
        loader=make_loader(config, dataset, rank=model.dp_rank, world_size=layout.dp),
        validation=validation,
        judge=Judge(config.stability, config.optim, device),
        watch=Watch(config),
        average=WeightAverage(model.state_dict(), config.ema) if config.ema.decay else None,
    )
    for entry in read_interventions(directory):
        run.loader.skip_rows(entry.first_row, entry.end_row)
        for stage in model.stages:
            leave_fp8(stage.model, entry.out_of_fp8)
    if resume:
        run.restore()
    if run.step == 0 and job.is_first():
        if isinstance(dataset, Dataset):
            dataset.tokenizer.save(directory / TOKENIZER_DIR)
        _write_record(run)
    return run


def default_run_directory(config: RunConfig) -> Path:
    """``output_dir/name-DATE-TIME``."""
    return Path(config.output_dir) / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def create_run_directory(directory: Path, config: RunConfig) -> None:
    """Make ``directory`` the home of a new run. Raises ConfigError if one lives there."""
    if (directory / CONFIG_FILE).exists():
        raise ConfigError(
            f"{directory} already holds a run; continue it with --resume {directory} or choose "
            "another directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot create the run directory: {error}") from None


def read_run_config(directory: Path, overrides: list[str]) -> RunConfig:
    """The configuration a run was started with, plus overrides such as ``train.num_steps=500``."""
    if not (directory / CONFIG_FILE).is_file():
        raise ConfigError(f"{directory} is not a run directory: it has no {CONFIG_FILE}")
    return load_any_config(directory / CONFIG_FILE, overrides)


def _write_record(run: Run) -> None:
    record: dict[str, Any] = {
        "trinity": version("trinity-pretrain"),
        "config_sha256": run.config.sha256(),
        "data_fingerprint": run.dataset.fingerprint,
        "sources": run.dataset.record(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(run.device),
        "world_size": job.world_size(),
        "layout": str(run.model.layout),
        "num_threads": torch.get_num_threads(),
    }
    (run.directory / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
