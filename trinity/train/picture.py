"""Generated images as a picture to look at. Needs the extra ``images``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trinity.core.errors import ConfigError, DataError

GAP_PIXELS = 2
LABEL_PIXELS = 12
BACKGROUND = 255


def save_grid(
    path: Path | str,
    images: Tensor,
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    enlarge: int = 1,
) -> None:
    """Write images side by side as a PNG, row by row from the top left.

    Args:
        path: of the PNG, written in one go: it is never seen half done.
        images: (B, C, H, W) in [-1, 1], clipped, of 1 or 3 channels; other channels, as of
            latents, are shown by the first alone. Of videos (B, C, T, H, W), the frames of each
            stand side by side as one wide picture.
        columns: images in a row.
        labels: a line under each image.
        enlarge: edge of a pixel in the picture.

    Raises:
        ConfigError: for numbers that make no grid, values that are not finite, or without Pillow.
        DataError: where the file cannot be written.
    """
    from trinity.data.pixels import need

    need("PIL")
    from PIL import Image, ImageDraw

    if columns < 1 or enlarge < 1 or len(images) == 0:
        raise ConfigError(f"{len(images)} images in columns={columns}, enlarge={enlarge}: no grid")
    if labels is not None and len(labels) != len(images):
        raise ConfigError(f"{len(labels)} labels for {len(images)} images; give one for each")
    tiles = _tiles(images, enlarge)
    height, width = tiles.shape[1] + GAP_PIXELS, tiles.shape[2] + GAP_PIXELS
    height += LABEL_PIXELS if labels else 0
    rows = -(-len(tiles) // columns)
    shape = (rows * height + GAP_PIXELS, min(columns, len(tiles)) * width + GAP_PIXELS, 3)
    canvas = np.full(shape, BACKGROUND, dtype=np.uint8)
    corners = [
        (GAP_PIXELS + i // columns * height, GAP_PIXELS + i % columns * width)
        for i in range(len(tiles))
    ]
    for tile, (top, left) in zip(tiles, corners, strict=True):
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for text, (top, left) in zip(labels or (), corners, strict=False):
        draw.text((left, top + tiles.shape[1]), text, fill="black")
    _write(Path(path), picture)


def _tiles(images: Tensor, enlarge: int) -> np.ndarray:
    """uint8 (B, height, width, 3)."""
    if images.ndim == 5:  # frames side by side
        images = images.permute(0, 1, 3, 2, 4).flatten(3)
    if images.ndim != 4:
        raise ConfigError(f"images of shape {tuple(images.shape)} are neither images nor videos")
    if not torch.isfinite(images).all():
        raise ConfigError("images hold NaN or infinity; there is nothing to show")
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    values = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    values = values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return values.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2).numpy()


def _write(path: Path, picture: object) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, "PNG")  # type: ignore[attr-defined]
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot write the picture: {error}; free space there") from None
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
