"""What samples are drawn under: classes, embeddings, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trinity.core.errors import ConfigError, DataError
from trinity.core.image_run_config import ImageRunConfig, SamplesConfig


def no_condition(config: ImageRunConfig, condition: Tensor) -> Tensor:
    """What stands for no condition, shaped like ``condition``."""
    none = config.model.num_classes if config.model.condition == "class" else 0
    return torch.full_like(condition, none)


def class_columns(config: ImageRunConfig, columns: Sequence[int], rows: int) -> Tensor:
    """Conditions of a grid whose columns are classes, row by row; (rows * columns,), int64.

    Raises ConfigError for a class that the model does not have.
    """
    if config.model.condition != "class":
        raise ConfigError(
            f"classes {list(columns)} are asked for, but the model knows none "
            f'(model.condition="{config.model.condition}"); leave them out'
        )
    for label in columns:
        if not 0 <= label < config.model.num_classes:
            raise ConfigError(
                f"class {label} does not exist: the model knows 0 to {config.model.num_classes - 1}"
            )
    return torch.tensor(list(columns) * rows, dtype=torch.int64)


def embedding_columns(config: ImageRunConfig, path: Path, rows: int) -> Tensor:
    """Conditions of a grid whose columns are the "embeddings" (N, W) of a safetensors file, row by
    row; (rows * N, W), fp32.

    Raises ConfigError for a model that takes none, DataError for a file that has none for it.
    """
    from safetensors import SafetensorError, safe_open

    width = config.model.embedding_width
    if config.model.condition != "embedding":
        raise ConfigError(
            f"--embeddings {path}: the model takes none "
            f'(model.condition="{config.model.condition}"); leave them out'
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            embeddings = file.get_tensor("embeddings").float()
    except (OSError, SafetensorError) as error:
        raise DataError(
            f'--embeddings {path}: {error}; pass safetensors with "embeddings" (N, {width})'
        ) from None
    if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings):
        raise DataError(
            f'--embeddings {path}: "embeddings" has the shape {tuple(embeddings.shape)}; the model '
            f"takes (N, {width})"
        )
    if not embeddings.isfinite().all():
        raise DataError(f'--embeddings {path}: "embeddings" has values that are not finite')
    return embeddings.repeat(rows, 1)


def grid_condition(
    config: ImageRunConfig,
    settings: SamplesConfig,
    rows: int,
    *,
    classes: Sequence[int] | None = None,
    embeddings: Path | None = None,
) -> Tensor:
    """Of the given classes or embeddings, or of the first classes; for a model of something else,
    of images of nothing."""
    if embeddings is not None:
        return embedding_columns(config, embeddings, rows)
    if config.model.condition == "class" and classes is None:
        classes = range(min(settings.columns, config.model.num_classes))
    if classes is not None:
        return class_columns(config, classes, rows)
    num_images = rows * settings.columns
    if config.model.condition == "embedding":
        return torch.zeros(num_images, config.model.embedding_width)
    return torch.zeros(num_images, dtype=torch.int64)


def parse_classes(text: str) -> list[int]:
    """The numbers of the command line's ``--classes``. Raises ConfigError where there are none."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--classes {text!r} is no list of numbers, such as 0,1,2")
    return [int(word) for word in words]
