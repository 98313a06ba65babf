"""From configured sources to images that can be read by number. Needs the extra ``images``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trinity.core.errors import DataError
from trinity.core.images_config import ImagesConfig, ImageSourceConfig
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.image_files import open_folder, open_parquet
from trinity.data.image_sources import UNLABELLED, OpenedSource, open_digits, open_pictures
from trinity.data.latents import open_latents

IMAGES_VERSION = 1
"""Counts changes of how the same files become other images."""

Condition = int | Tensor
"""Class of an image (UNLABELLED: none), or its embedding, float32 (width,)."""


@dataclass(frozen=True)
class ImageSource:
    """One source; its images are numbered within each split."""

    name: str
    weight: float
    opened: OpenedSource
    classes: np.ndarray[Any, Any]
    """int64, by number of the class within the source: its number in the whole data set."""
    items: dict[str, np.ndarray[Any, Any]]
    """Items of the source that are the images of a split."""
    description: dict[str, Any]

    def read(self, split: str, number: int) -> tuple[Tensor, Condition]:
        """Image ``number`` of a split and its condition."""
        item = int(self.items[split][number])
        condition = self.opened.condition
        if condition.embedding is not None:
            return self.opened.read(item), condition.embedding(item)
        label = int(condition.labels[item])
        return self.opened.read(item), label if label < 0 else int(self.classes[label])


@dataclass(frozen=True)
class ImageDataset:
    """All sources of a configuration.

    The images of a split are numbered through, one source after the other.
    """

    sources: tuple[ImageSource, ...]
    class_names: tuple[str, ...]
    """Sources share classes of the same name."""
    embedding_width: int
    """0: images have classes, or nothing."""
    fingerprint: str
    """SHA-256 of everything that, with the seed, determines which image is where in the stream."""

    @property
    def num_classes(self) -> int:
        """0 where no image has a class."""
        return len(self.class_names)

    def num_images(self, split: str) -> int:
        """Images of TRAIN or HELD_OUT."""
        return sum(len(source.items[split]) for source in self.sources)

    def read(self, split: str, number: int) -> tuple[Tensor, Condition]:
        """Image ``number`` of a split, float32 (C, H, W) or (C, T, H, W), and its condition.

        Pixels are in [-1, 1], latents as they were stored. Raises DataError for a damaged file.
        """
        source, own = self.locate(split, number)
        return self.sources[source].read(split, own)

    def locate(self, split: str, number: int) -> tuple[int, int]:
        """(source, number within it) of an image."""
        if not 0 <= number < self.num_images(split):
            raise IndexError(f"image {number} of {self.num_images(split)} in {split}")
        for index, source in enumerate(self.sources):
            if number < len(source.items[split]):
                return index, number
            number -= len(source.items[split])
        raise AssertionError

    def record(self) -> list[dict[str, Any]]:
        """A description of each source, for the run's record."""
        return [source.description for source in self.sources]


def build_images(config: ImagesConfig, *, channels: int, seed: int) -> ImageDataset:
    """Open every source.

    Args:
        config: sources and the shape of the images.
        channels: of the images: 1 gray, 3 RGB; of latents, as many as they have.
        seed: of the places where pieces are cut.

    Raises:
        ConfigError: when a package is missing.
        DataError: for sources that are missing, damaged, empty, or that do not fit one another.
    """
    opened = [_open(config, source, channels, seed) for source in config.sources]
    names = tuple(dict.fromkeys(n for one in opened for n in one.condition.class_names))
    widths = {one.condition.embedding_width for one in opened}
    if len(widths) > 1:
        raise DataError(
            f"data sources have embeddings of widths {sorted(widths)} (0: none); all must have the "
            "same"
        )
    sources = tuple(_named(*pair, names) for pair in zip(config.sources, opened, strict=True))
    for source in sources:
        if not len(source.items[TRAIN]):
            raise DataError(
                f"data source {source.name!r} has no training image; check its path, or lower "
                "images.held_out_fraction"
            )
    identity = {
        "version": IMAGES_VERSION,
        "seed": seed,
        "shape": [channels, *config.extent()],
        "packing": [config.lanes, config.coarse_shares, config.flip],
        "cuts": [config.crops_per_image, config.held_out_fraction],
        "sources": [
            [s.name, s.weight, own.format, own.cuts_pieces, s.opened.content_sha256]
            for s, own in zip(sources, config.sources, strict=True)
        ],
        "classes": names,
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return ImageDataset(sources, names, widths.pop(), fingerprint)


def _open(
    config: ImagesConfig, source: ImageSourceConfig, channels: int, seed: int
) -> OpenedSource:
    if source.format == "digits":
        return open_digits(config, source, channels)
    if source.format == "latents":
        return open_latents(config, source, channels)
    openers = {"folder": open_folder, "parquet": open_parquet}
    return openers.get(source.format, open_pictures)(config, source, channels, seed)


def _named(source: ImageSourceConfig, opened: OpenedSource, names: Sequence[str]) -> ImageSource:
    held_out = opened.held_out
    items = {TRAIN: np.flatnonzero(~held_out), HELD_OUT: np.flatnonzero(held_out)}
    classes = [names.index(name) for name in opened.condition.class_names]
    labelled = int((opened.condition.labels != UNLABELLED).sum())
    description = {
        "name": source.name,
        "format": source.format,
        "path": source.path,
        "num_files": opened.num_files,
        "content_sha256": opened.content_sha256,
        "num_classes": len(classes),
        "num_labelled": labelled,
        "num_images": {split: len(own) for split, own in items.items()},
    }
    own_classes = np.array(classes, dtype=np.int64)
    return ImageSource(source.name, source.weight, opened, own_classes, items, description)
