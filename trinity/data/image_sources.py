"""Sources of images that packages ship, and what all sources of images have in common."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.core.errors import DataError
from trinity.core.images_config import ImagesConfig, ImageSourceConfig
from trinity.data import pixels
from trinity.data.sources import is_held_out

UNLABELLED = -1
"""Class of an image that has none."""
MAX_CLASSES = 1_000_000
"""No data set has more; a damaged number must not become so many names."""
HASH_BELOW_BYTES = 1 << 30
"""Files up to this size together are read at every start and known by their contents; larger
sources by names and sizes."""
SKIMAGE_PICTURES = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "color.png", "grass.png", "gravel.png", "horse.png"),
    *("hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png", "motorcycle_left.png"),
    *("page.png", "phantom.png", "retina.jpg", "rocket.jpg", "text.png"),
)
"""What the wheel of scikit-image ships; the rest of skimage.data would be downloaded."""


@dataclass(frozen=True)
class Conditions:
    """What each of N items shows: its class, or an embedding, or nothing."""

    class_names: tuple[str, ...]
    labels: np.ndarray[Any, Any]
    """int64 (N,), indices into class_names or UNLABELLED."""
    embedding: Callable[[int], Tensor] | None = None
    """Item to float32 (embedding_width,)."""
    embedding_width: int = 0

    @classmethod
    def none(cls, num_items: int) -> Conditions:
        """Nothing is known."""
        return cls((), np.full(num_items, UNLABELLED, dtype=np.int64))

    @classmethod
    def classes(cls, labels: Iterable[int | None], names: tuple[str, ...]) -> Conditions:
        """Numbers of classes; None where an item has none."""
        known = [UNLABELLED if label is None else label for label in labels]
        return cls(names, np.array(known, dtype=np.int64))

    @classmethod
    def numbered(cls, labels: Iterable[int | None], where: str) -> Conditions:
        """Classes named by their numbers. Raises DataError for what numbers no class."""
        known = [UNLABELLED if label is None else label for label in labels]
        wrong = [v for v in known if not isinstance(v, int) or not UNLABELLED <= v < MAX_CLASSES]
        if wrong:
            raise DataError(
                f"{where} holds {wrong[0]!r}, which numbers no class: classes are numbered from 0, "
                f"{UNLABELLED} stands for none, and embeddings are lists of numbers"
            )
        return cls.classes(known, tuple(map(str, range(max(known, default=UNLABELLED) + 1))))

    def of(self, items: np.ndarray[Any, Any]) -> Conditions:
        """The conditions of some items, in their order."""
        whole = self.embedding
        chosen = None if whole is None else lambda item: whole(int(items[item]))
        return Conditions(self.class_names, self.labels[items], chosen, self.embedding_width)


@dataclass(frozen=True)
class OpenedSource:
    """Items that can be read in any order; nothing is decoded before."""

    num_files: int
    content_sha256: str
    """Changes when a file does, or their order."""
    condition: Conditions
    held_out: np.ndarray[Any, Any]
    """bool (N,)."""
    read: Callable[[int], Tensor]
    """Item to float32 (C, H, W) or (C, T, H, W)."""


@dataclass(frozen=True)
class PictureTable:
    """Pictures of any size, before they are cut to images."""

    num_files: int
    content_sha256: str
    condition: Conditions
    held_out: np.ndarray[Any, Any]
    num_pieces: np.ndarray[Any, Any]
    """Images to make of each picture, int64 (N,)."""
    decode: Callable[[int], pixels.Picture]


def cut_to_images(
    table: PictureTable, config: ImagesConfig, source: ImageSourceConfig, channels: int, seed: int
) -> OpenedSource:
    """Each picture of a table resized, or pieces of it. Raises DataError for other channels."""
    check_channels(source, channels)
    height, width = config.height, config.width
    first = np.cumsum(table.num_pieces) - table.num_pieces
    picture_of = np.repeat(np.arange(len(first)), table.num_pieces)

    def read(item: int) -> Tensor:
        number = int(picture_of[item])
        picture = table.decode(number)
        if source.cuts_pieces:
            crop = item - int(first[number])
            cut = pixels.piece(picture, height, width, seed=seed, number=number, crop=crop)
        else:
            cut = pixels.fitted(picture, height, width)
        return pixels.to_pixels(cut, channels)

    condition, held_out = table.condition.of(picture_of), table.held_out[picture_of]
    return OpenedSource(table.num_files, table.content_sha256, condition, held_out, read)


def check_channels(source: ImageSourceConfig, channels: int) -> None:
    """Raise DataError unless ``channels`` are those of gray or colour."""
    if channels not in (1, 3):
        raise DataError(
            f"data source {source.name!r} has images of 1 or 3 channels, but model.channels="
            f"{channels}; only latents have other numbers"
        )


def held_out_by_key(
    source: ImageSourceConfig, keys: Iterable[object], fraction: float
) -> np.ndarray[Any, Any]:
    """Which items are held out, bool (N,): decided by each item's key alone."""
    return np.array([is_held_out(f"{source.name}/{key}", fraction) for key in keys], dtype=bool)


def files_sha256(paths: Sequence[str], names: Sequence[str], condition: Conditions) -> str:
    """Hash of the files' contents, or sizes where these are large, of names, and of classes."""
    sizes = [os.stat(path).st_size for path in paths]
    digest = hashlib.sha256(json.dumps([names, condition.class_names, sizes]).encode())
    digest.update(condition.labels.tobytes())
    if is_small(paths):
        for path in paths:
            with open(path, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def is_small(paths: Sequence[str]) -> bool:
    """Whether files are small enough, together, to be read at every start."""
    return sum(os.stat(path).st_size for path in paths) <= HASH_BELOW_BYTES


def open_digits(config: ImagesConfig, source: ImageSourceConfig, channels: int) -> OpenedSource:
    """scikit-learn's handwritten digits, enlarged."""
    check_channels(source, channels)
    pixels.need("sklearn")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.ascontiguousarray(bunch.images, dtype=np.float32)  # (N, 8, 8), 0 to 16

    def read(item: int) -> Tensor:
        gray = torch.from_numpy(images[item]) / 8 - 1
        return pixels.resized(gray, config.height, config.width).repeat(channels, 1, 1)

    return OpenedSource(
        num_files=0,
        content_sha256=hashlib.sha256(images.tobytes()).hexdigest(),
        condition=Conditions.classes(bunch.target, tuple(map(str, bunch.target_names))),
        held_out=held_out_by_key(source, range(len(images)), config.held_out_fraction),
        read=read,
    )


def open_pictures(
    config: ImagesConfig, source: ImageSourceConfig, channels: int, seed: int
) -> OpenedSource:
    """The pictures of a package, a class each; they are few and are held in memory.

    Where pieces are cut, those of the held-out set come from a strip of each picture of its own.
    """
    files = _picture_files(source)
    pictures = [pixels.decode(file, str(file)) for file in files]
    labels = list(range(len(files)))
    fraction = config.held_out_fraction
    held_out = held_out_by_key(source, [file.name for file in files], fraction)
    num_pieces = [1] * len(files)
    if source.cuts_pieces:
        parts = [pixels.parted(picture, config.width, fraction) for picture in pictures]
        strips = [(label, part[1]) for label, part in enumerate(parts) if part[1] is not None]
        pictures = [part[0] for part in parts] + [strip for _, strip in strips]
        labels += [label for label, _ in strips]
        held_out = np.arange(len(pictures)) >= len(files)
        num_pieces = [config.crops_per_image] * len(files)
        num_pieces += [max(1, round(config.crops_per_image * fraction))] * len(strips)
    condition = Conditions.classes(labels, tuple(file.stem for file in files))
    table = PictureTable(
        num_files=len(files),
        content_sha256=files_sha256(list(map(str, files)), [], condition),
        condition=condition,
        held_out=held_out,
        num_pieces=np.array(num_pieces, dtype=np.int64),
        decode=pictures.__getitem__,
    )
    return cut_to_images(table, config, source, channels, seed)


def _picture_files(source: ImageSourceConfig) -> list[Path]:
    package = "sklearn" if source.format == "photos" else "skimage"
    pixels.need(package)
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    if source.format == "photos":
        return [root / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    return [root / "data" / name for name in SKIMAGE_PICTURES]
