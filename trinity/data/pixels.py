"""From encoded pictures to pixels: decoding, pieces, channels. Needs the extra ``images``.

A decoded picture is uint8 (height, width, 1 or 3): gray or RGB.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.draws import Stream, generator_for
from trinity.core.errors import ConfigError, DataError

Picture = np.ndarray[Any, Any]
"""uint8 (height, width, 1 or 3)."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in gray (ITU-R BT.601, as in JPEG and Pillow)."""


def need(package: str) -> None:
    """Raise ConfigError naming the extra when an optional package is absent."""
    try:
        __import__(package)
    except ImportError:
        raise ConfigError(
            f"{package} is not installed, which images need; "
            'install the extra: pip install "trinity-pretrain[images]"'
        ) from None


def decode(content: bytes | Path, where: str) -> Picture:
    """Decode a picture as a viewer would show it: turned upright, transparency over white.

    16 bits of gray become 8, animations their first frame. ``where`` names the picture in errors.
    Raises DataError for what is damaged, no picture, or far too large.
    """
    from PIL import ImageOps

    with _opened(content, where) as image:
        return _as_gray_or_rgb(ImageOps.exif_transpose(image))


def check_header(path: Path) -> None:
    """Raise DataError unless a file begins like a picture; its pixels are not decoded."""
    with _opened(path, str(path)):
        pass


@contextmanager
def _opened(content: bytes | Path, where: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be decoded as a picture: {error}; remove it") from None


def _as_gray_or_rgb(image: Any) -> Picture:
    from PIL import Image

    if image.mode[0] in "IF":  # one channel of more than 8 bits
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its gray values are not whole numbers of 16 bits")
        return (values / 257).round().astype(np.uint8)[..., None]
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    gray = image.mode in ("1", "L")
    values = np.asarray(image.convert("L" if gray else "RGB"))
    return values[..., None] if gray else values


def fitted(picture: Picture, height: int, width: int) -> Picture:
    """The middle of a picture, as large as the shape allows, resized (bicubic, antialiased)."""
    from PIL import Image, ImageOps

    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    resized = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return resized.reshape(height, width, -1)


def piece(
    picture: Picture, height: int, width: int, *, seed: int, number: int, crop: int
) -> Picture:
    """Random piece ``crop`` of picture ``number``, not resized: a function of its arguments alone.

    A picture smaller than the piece is enlarged first.
    """
    tall, wide = picture.shape[:2]
    if tall < height or wide < width:
        factor = max(height / tall, width / wide)
        picture = fitted(
            picture, max(height, round(tall * factor)), max(width, round(wide * factor))
        )
        tall, wide = picture.shape[:2]
    draws = generator_for(seed, number, crop, Stream.CROP)
    top, left = draws.integers(tall - height + 1), draws.integers(wide - width + 1)
    return picture[top : top + height, left : left + width]


def parted(
    picture: Picture, width: int, held_out_fraction: float
) -> tuple[Picture, Picture | None]:
    """A picture's part to train on and the strip at its right that is held out.

    The strip takes ``held_out_fraction`` of the columns, but at least ``width``; None where that
    is not possible or not wanted, so that no pixel is in both.
    """
    wide = picture.shape[1]
    strip = max(width, round(wide * held_out_fraction))
    if held_out_fraction == 0 or wide - strip < width:
        return picture, None
    return picture[:, : wide - strip], picture[:, wide - strip :]


def to_pixels(picture: Picture, channels: int) -> Tensor:
    """float32 (channels, height, width) in [-1, 1]; gray is repeated, RGB becomes luminance."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    if channels == 1 and len(values) == 3:
        values = torch.tensordot(torch.tensor(LUMINANCE), values, dims=1)[None]
    return (values / 127.5 - 1).expand(channels, -1, -1).contiguous()


def resized(gray: Tensor, height: int, width: int) -> Tensor:
    """A gray image (h, w) at another size, bilinear, (height, width)."""
    size = (height, width)
    return F.interpolate(gray[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
