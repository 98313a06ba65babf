"""``[images]``: sources of images, their size, and how they fill the rows of a batch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trinity.core.tables import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Table,
)

ImageFormat = Literal["digits", "photos", "skimage", "folder", "parquet", "latents"]
BUILT_IN = ("digits", "photos", "skimage")
"""Formats that read what a package ships; all others have a path."""


class ImageSourceConfig(Table):
    """One weighted source of images, or of latents made from images or videos beforehand.

    ``digits``: scikit-learn's 1797 handwritten digits, 10 classes. ``photos``: its two photographs.
    ``skimage``: the pictures inside scikit-image; each is a class. ``folder``: image files, a class
    per subfolder unless a ``metadata.jsonl`` or ``.csv`` says otherwise. ``parquet``: files, or a
    directory of them, with a column of encoded images. ``latents``: safetensors shards with
    "latents" (N, C, H, W) or (N, C, T, H, W) and perhaps "labels" (N,) or "embeddings" (N, width),
    or parquet with a column of arrays; used as they are, so store them at unit variance.
    """

    name: str = Field(min_length=1)
    format: ImageFormat
    path: str = Field(default="", description="file, directory or glob; none for built-in pictures")
    image_key: str = Field(default="image", description="column of images or arrays, in parquet")
    label_key: str = Field(
        default="label",
        description="column of classes (whole numbers or names) or of embeddings (lists of "
        "numbers); empty: none",
    )
    weight: PositiveFloat = Field(default=1.0, description="share of the images, relative")
    crop: Literal["auto", "whole", "random"] = Field(
        default="auto",
        description="whole: the middle of the image, as large as fits, resized. random: "
        "crops_per_image pieces without resizing. auto: random for photos and skimage, else whole",
    )

    @property
    def cuts_pieces(self) -> bool:
        """Whether images are random pieces of pictures."""
        pictures = self.format in ("photos", "skimage")
        return self.crop == "random" or (self.crop == "auto" and pictures)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path == "") != (self.format in BUILT_IN):
            raise ValueError(
                f"source {self.name!r}: path={self.path!r} with format={self.format!r}; give a "
                f"path, but none for {', '.join(BUILT_IN)}"
            )
        if self.crop == "random" and self.format in ("digits", "latents"):
            raise ValueError(
                f"source {self.name!r}: crop='random' cannot be with format={self.format!r}"
            )
        return self


class ImagesConfig(Table):
    """Images, their mixture, and how they are packed into rows."""

    sources: tuple[ImageSourceConfig, ...] = Field(min_length=1)
    height: Positive = Field(description="of every image or latent")
    width: Positive
    frames: NonNegative = Field(default=0, description="of every video latent; 0: images")
    crops_per_image: Positive = Field(default=64, description="pieces of a picture cut at random")
    flip: bool = Field(default=False, description="mirror half of the training images")
    cache_dir: str = Field(default="runs/data-cache", description="for indices of parquet, folders")
    lanes: Positive = Field(default=8, description="independent row streams; a constant of the run")
    coarse_shares: tuple[NonNegativeFloat, ...] = Field(
        default=(),
        description="chance of each of model.patch_scales, relative, for a training image; empty: "
        "only the first",
    )
    decode_threads: Positive = Field(default=1, description="images decoded at once")
    skip_rows: tuple[tuple[NonNegative, Positive], ...] = Field(
        default=(), description="rows of the stream never trained on: [first, end) pairs, ascending"
    )
    held_out_fraction: Fraction = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names {names} must differ from one another")
        formats = {source.format for source in self.sources}
        if self.frames and formats != {"latents"}:
            raise ValueError(
                f"frames={self.frames} needs sources of format latents only; the others are images"
            )
        if self.flip and "latents" in formats:
            raise ValueError("flip=true: the mirrored latent is no latent of the mirrored image")
        if self.coarse_shares and not any(self.coarse_shares):
            raise ValueError(f"coarse_shares={list(self.coarse_shares)} leave no patch scale")
        bounds = [bound for window in self.skip_rows for bound in window]
        if bounds != sorted(set(bounds)):
            raise ValueError(
                f"skip_rows={[list(window) for window in self.skip_rows]} must be [first, end) "
                "pairs that ascend and do not touch"
            )
        return self

    def extent(self) -> tuple[int, ...]:
        """(height, width), or (frames, height, width) of videos."""
        return (self.frames, self.height, self.width) if self.frames else (self.height, self.width)
