"""Images and latents of the user's own: folders, parquet files, shards of latents."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.core.errors import DataError
from trinity.core.images_config import ImagesConfig, ImageSourceConfig
from trinity.data import pixels
from trinity.data.image_sources import (
    UNLABELLED,
    Conditions,
    OpenedSource,
    PictureTable,
    cut_to_images,
    files_sha256,
    held_out_by_key,
    is_small,
)

DEFAULT_LABEL_KEY = ImageSourceConfig.model_fields["label_key"].default


def open_folder(
    config: ImagesConfig, source: ImageSourceConfig, channels: int, seed: int
) -> OpenedSource:
    """Image files below a directory. Raises DataError when there are none."""
    pixels.need("PIL")
    from datasets import Image

    root = Path(source.path).absolute()
    if not root.is_dir():
        raise DataError(f"data source {source.name!r}: path={source.path!r} is no directory")
    rows = load_rows(config, source, "imagefolder", [f"{glob.escape(str(root))}/**"])
    if "image" not in rows.column_names:
        raise DataError(f"data source {source.name!r}: there is no image file below {root}")
    rows = rows.cast_column("image", Image(decode=False))
    paths = [str(value["path"]) for value in rows["image"]]
    if is_small(paths):
        for path in paths:
            pixels.check_header(Path(path))
    names = [Path(path).relative_to(root).as_posix() for path in paths]
    files = [*paths, *sorted(map(str, root.rglob("metadata.*")))]

    def content(item: int) -> tuple[Path, str]:
        return Path(paths[item]), paths[item]

    table = _table(config, source, rows, files, names, content)
    return cut_to_images(table, config, source, channels, seed)


def open_parquet(
    config: ImagesConfig, source: ImageSourceConfig, channels: int, seed: int
) -> OpenedSource:
    """Encoded images in a column of parquet files. Raises DataError where it holds none."""
    pixels.need("PIL")
    from datasets import Image

    paths = matching_files(source, (".parquet",))
    rows = load_rows(config, source, "parquet", paths)
    key = image_column(source, rows)
    if isinstance(rows.features[key], Image):
        rows = rows.cast_column(key, Image(decode=False))

    def content(item: int) -> tuple[bytes, str]:
        where = f"data source {source.name!r}, row {item}, column {key!r}"
        value = rows[item][key]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise DataError(
                f"{where} holds {type(value).__name__}, not an encoded image; set image_key to a "
                "column of images, and write their bytes into it"
            )
        return value, where

    pixels.decode(*content(0))
    table = _table(config, source, rows, paths, range(len(rows)), content)
    return cut_to_images(table, config, source, channels, seed)


def _table(
    config: ImagesConfig,
    source: ImageSourceConfig,
    rows: Any,
    paths: list[str],
    keys: Sequence[object],
    content: Callable[[int], tuple[bytes | Path, str]],
) -> PictureTable:
    condition = read_conditions(source, rows)
    num_pieces = config.crops_per_image if source.cuts_pieces else 1
    return PictureTable(
        num_files=len(paths),
        content_sha256=files_sha256(
            paths, [source.image_key, source.label_key, *map(str, keys)], condition
        ),
        condition=condition,
        held_out=held_out_by_key(source, keys, config.held_out_fraction),
        num_pieces=np.full(len(rows), num_pieces, dtype=np.int64),
        decode=lambda item: pixels.decode(*content(item)),
    )


def load_rows(
    config: ImagesConfig, source: ImageSourceConfig, builder: str, patterns: list[str]
) -> Any:
    """A Hugging Face dataset of local files, memory-mapped from an index in ``cache_dir``."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            builder, data_files=patterns, split="train", cache_dir=f"{config.cache_dir}/images"
        )
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise DataError(
            f"data source {source.name!r}: cannot read {source.path} as {source.format}: "
            f"{error.__cause__ or error}; mend or remove what is damaged"
        ) from None
    if len(rows) == 0:
        raise DataError(f"data source {source.name!r}: {source.path} holds no row")
    return rows


def matching_files(source: ImageSourceConfig, suffixes: tuple[str, ...]) -> list[str]:
    """Files of a source, sorted by name. Raises DataError when there are none."""
    path = Path(source.path)
    if path.is_dir():
        found = [str(p) for p in path.rglob("*") if p.is_file() and p.suffix in suffixes]
    else:
        found = glob.glob(source.path, recursive=True)
    if not found:
        raise DataError(
            f"data source {source.name!r}: path={source.path!r} matches no file; give a file, a "
            f"glob, or a directory of {' or '.join(suffixes)} files"
        )
    return sorted(found)


def image_column(source: ImageSourceConfig, rows: Any) -> str:
    """The column of images or latents. Raises DataError when there is none."""
    names = [source.image_key, *(["latents"] if source.format == "latents" else [])]
    for name in names:
        if name in rows.column_names:
            return name
    raise DataError(
        f"data source {source.name!r} has no column {source.image_key!r}; its columns are "
        f"{sorted(rows.column_names)}; set image_key"
    )


def read_conditions(source: ImageSourceConfig, rows: Any) -> Conditions:
    """Classes or embeddings from the column ``label_key``, by the type of its values.

    Raises DataError for a column that is missing or holds something else.
    """
    key = source.label_key
    if key not in rows.column_names:
        if key not in ("", DEFAULT_LABEL_KEY):
            raise DataError(
                f"data source {source.name!r} has no column {key!r}; its columns are "
                f"{sorted(rows.column_names)}; set label_key, or to nothing where there are none"
            )
        return Conditions.none(len(rows))
    where = f"data source {source.name!r}: column {key!r}"
    feature = rows.features[key]
    values = rows.select_columns([key])
    if hasattr(feature, "feature"):  # a list
        width = len(values[0][key])

        def embedding(item: int) -> Tensor:
            value = torch.tensor(values[item][key], dtype=torch.float32)
            if value.shape != (width,):
                raise DataError(f"{where} holds lists of other lengths than {width}: row {item}")
            return value

        return Conditions((), np.full(len(rows), UNLABELLED), embedding, width)
    plain = list(values[key])
    if hasattr(feature, "names"):
        return Conditions.classes(plain, tuple(feature.names))
    given = {value for value in plain if value is not None}
    if given and all(isinstance(value, str) for value in given):
        names = tuple(sorted(given))
        number = {name: index for index, name in enumerate(names)}
        return Conditions.classes([number.get(value) for value in plain], names)
    return Conditions.numbered(plain, where)
