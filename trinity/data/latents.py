"""Latents that an encoder made beforehand, with their classes or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.core.errors import DataError
from trinity.core.images_config import ImagesConfig, ImageSourceConfig
from trinity.data.image_files import image_column, load_rows, matching_files, read_conditions
from trinity.data.image_sources import (
    UNLABELLED,
    Conditions,
    OpenedSource,
    files_sha256,
    held_out_by_key,
)

LATENTS, LABELS, EMBEDDINGS = "latents", "labels", "embeddings"
"""Keys of a safetensors shard."""


def open_latents(config: ImagesConfig, source: ImageSourceConfig, channels: int) -> OpenedSource:
    """Shards of latents. Raises DataError for what is damaged or of another shape."""
    paths = matching_files(source, (".safetensors", ".parquet"))
    suffixes = {path.rpartition(".")[2] for path in paths}
    if suffixes == {"safetensors"}:
        shards: SafetensorsShards | ParquetLatents = SafetensorsShards(source, paths)
    elif suffixes == {"parquet"}:
        shards = ParquetLatents(load_rows(config, source, "parquet", paths), source)
    else:
        raise DataError(
            f"data source {source.name!r}: latents are .safetensors or .parquet files, not "
            f"{sorted(suffixes)}; give each kind a source of its own"
        )
    shape = (channels, *config.extent())

    def read(item: int) -> Tensor:
        latent = shards.read(item)
        if tuple(latent.shape) != shape:
            raise DataError(
                f"data source {source.name!r}, item {item}: a latent of shape "
                f"{tuple(latent.shape)}, where model.channels and images.frames, height and width "
                f"ask for {shape}"
            )
        if not torch.isfinite(latent).all():
            raise DataError(
                f"data source {source.name!r}, item {item}: NaN or infinity; encode it anew"
            )
        return latent

    read(0)
    return OpenedSource(
        num_files=len(paths),
        content_sha256=files_sha256(paths, [source.image_key, source.label_key], shards.condition),
        condition=shards.condition,
        held_out=held_out_by_key(source, range(len(shards)), config.held_out_fraction),
        read=read,
    )


class ParquetLatents:
    """Rows of parquet files with a column of arrays."""

    def __init__(self, rows: Any, source: ImageSourceConfig) -> None:
        self.condition = read_conditions(source, rows)
        self._key = image_column(source, rows)
        self._rows = rows.select_columns([self._key]).with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, item: int) -> Tensor:
        """One latent, float32."""
        return torch.from_numpy(np.array(self._rows[item][self._key], dtype=np.float32))


class SafetensorsShards:
    """Tensors over several files, one after the other; only what is read leaves the disk."""

    def __init__(self, source: ImageSourceConfig, paths: Sequence[str]) -> None:
        opened = [_open_shard(path) for path in paths]
        self._shards = [shard for shard, _ in opened]
        counts = [shapes[LATENTS][0] for _, shapes in opened]
        self._ends = np.cumsum(counts)
        widths = {shapes.get(EMBEDDINGS, (0, 0))[1] for _, shapes in opened}
        if len(widths) > 1:
            raise DataError(
                f"data source {source.name!r}: embeddings of widths {sorted(widths)} in one source "
                "(0: a file has none); give each kind a source of its own"
            )
        labels: list[int] = []
        for (shard, shapes), count in zip(opened, counts, strict=True):
            has_labels = LABELS in shapes
            labels += shard.get_tensor(LABELS).tolist() if has_labels else [UNLABELLED] * count
        width = widths.pop()
        self.condition = (
            Conditions((), np.full(len(self), UNLABELLED), self._embedding, width)
            if width
            else Conditions.numbered(labels, f"data source {source.name!r}: {LABELS}")
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, item: int) -> Tensor:
        """One latent, float32."""
        return self._row(LATENTS, item)

    def _embedding(self, item: int) -> Tensor:
        return self._row(EMBEDDINGS, item)

    def _row(self, key: str, item: int) -> Tensor:
        number = int(np.searchsorted(self._ends, item, side="right"))
        row = item - (int(self._ends[number - 1]) if number else 0)
        return self._shards[number].get_slice(key)[row : row + 1][0].float()


def _open_shard(path: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A file and the shapes of its tensors. Raises DataError when they do not fit each other."""
    from safetensors import SafetensorError, safe_open

    try:
        shard: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no whole safetensors file: {error}; write it anew") from None
    shapes = {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    num_dims = {LATENTS: (4, 5), LABELS: (1,), EMBEDDINGS: (2,)}
    num_items = shapes.get(LATENTS, (0,))[0]
    for key, allowed in num_dims.items():
        shape = shapes.get(key)
        wrong = shape is not None and (len(shape) not in allowed or shape[0] != num_items)
        if wrong or (key == LATENTS and not num_items):
            raise DataError(
                f"{path} must hold {LATENTS} (N, C, H, W) or (N, C, T, H, W) and may hold {LABELS} "
                f"(N,) and {EMBEDDINGS} (N, width); its tensors are {shapes}"
            )
    return shard, shapes
