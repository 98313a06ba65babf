"""What a run trains on: documents or images, as batches."""

from __future__ import annotations

from trinity.core import job
from trinity.core.batch import AnyBatch
from trinity.core.config import Config, RunConfig
from trinity.core.dit_config import DiTConfig
from trinity.core.errors import ConfigError
from trinity.core.image_run_config import ImageRunConfig
from trinity.data.build import Dataset, build_dataset
from trinity.data.image_rows import ImageLoader, ImageRows, held_out_images
from trinity.data.images import ImageDataset, build_images
from trinity.data.loader import Loader, held_out_rows
from trinity.train.flow_batches import VALIDATION, flow_batch

AnyDataset = Dataset | ImageDataset
AnyLoader = Loader | ImageLoader


def open_dataset(config: RunConfig) -> AnyDataset:
    """Build or find what the configuration names."""
    if isinstance(config, ImageRunConfig):
        dataset = build_images(config.images, channels=config.model.channels, seed=config.seed)
        _check_conditions(config.model, dataset)
        return dataset
    assert isinstance(config, Config)
    return build_dataset(config.data, config.seed, config.model.vocab_size)


def _check_conditions(model: DiTConfig, dataset: ImageDataset) -> None:
    if model.condition == "class" and dataset.num_classes > model.num_classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but the images have {dataset.num_classes} "
            f"classes ({', '.join(dataset.class_names[:8])}, ...); raise it"
        )
    if model.condition == "embedding" and dataset.embedding_width != model.embedding_width:
        raise ConfigError(
            f"model.embedding_width={model.embedding_width}, but the images have embeddings of "
            f"width {dataset.embedding_width} (0: none); make them equal"
        )
    if model.condition == "class" and dataset.embedding_width:
        raise ConfigError(
            'model.condition="class", but the images have embeddings instead of classes; set it to '
            '"embedding"'
        )


def shared_dataset(config: RunConfig) -> AnyDataset:
    """The same for a job: one process of each machine builds, the others find it built."""
    if not job.is_first_of_node():
        job.barrier()
    dataset = open_dataset(config)
    if job.is_first_of_node():
        job.barrier()
    return dataset


def make_loader(
    config: RunConfig, dataset: AnyDataset, *, rank: int = 0, world_size: int = 1
) -> AnyLoader:
    """The training stream of a configuration, seen from one rank."""
    step_rows = [config.batch.rows_per_step, *(p.rows_per_step for p in config.batch.ramp)]
    if isinstance(config, ImageRunConfig):
        assert isinstance(dataset, ImageDataset)
        return ImageLoader(
            dataset,
            config.images,
            patch_size=config.model.patch_size,
            patch_frames=config.model.patch_frames,
            patch_scales=config.model.patch_scales,
            sequence_length=config.batch.sequence_length,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            step_rows=step_rows,
        )
    assert isinstance(config, Config)
    assert isinstance(dataset, Dataset)
    return Loader(
        dataset,
        config.data,
        sequence_length=config.batch.sequence_length,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        step_rows=step_rows,
    )


def next_batch(config: RunConfig, loader: AnyLoader, num_rows: int) -> AnyBatch:
    """This rank's share of the next ``num_rows`` rows."""
    if isinstance(loader, Loader):
        return loader.next_rows(num_rows)
    assert isinstance(config, ImageRunConfig)
    return flow_batch(loader.next_rows(num_rows), config)


def validation_batches(config: RunConfig, dataset: AnyDataset) -> dict[str, list[AnyBatch]]:
    """The same held-out rows every time, for each source that has any."""
    num_rows, size = config.train.validation_rows, config.batch.microbatch_rows
    if isinstance(dataset, Dataset):
        documents = held_out_rows(dataset, config.batch.sequence_length, num_rows, batch_rows=size)
        return {name: [*batches] for name, batches in documents.items()}
    assert isinstance(config, ImageRunConfig)
    per_row = config.batch.sequence_length // config.tokens_of_image
    held_out = held_out_images(dataset, num_rows * per_row, batch_rows=size, images_per_row=per_row)
    return {
        name: [flow_batch(_filled_up(rows, size), config, purpose=VALIDATION) for rows in batches]
        for name, batches in held_out.items()
    }


def _filled_up(rows: ImageRows, num_rows: int) -> ImageRows:
    """With empty rows behind: all microbatches of a pipeline must be alike."""
    missing = range(len(rows.rows), num_rows)
    return ImageRows([*rows.rows, *([] for _ in missing)], [*rows.row_numbers, *missing])
