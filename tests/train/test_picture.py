"""Grids of images: where each one stands, and what cannot be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trinity.core.errors import ConfigError, DataError
from trinity.train.picture import GAP_PIXELS, LABEL_PIXELS, save_grid


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_images_stand_row_by_row(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 6, 4)
    save_grid(tmp_path / "new" / "grid.png", images, 3)
    got = _read(tmp_path / "new" / "grid.png")
    down, right = 6 + GAP_PIXELS, 4 + GAP_PIXELS
    assert got.shape == (2 * down + GAP_PIXELS, 3 * right + GAP_PIXELS, 3)
    for number, value in enumerate((0, 64, 128, 191, 255)):
        top = GAP_PIXELS + number // 3 * down
        left = GAP_PIXELS + number % 3 * right
        tile = got[top : top + 6, left : left + 4]
        assert np.abs(tile.astype(int) - value).max() <= 1
        got = got.copy()
        got[top : top + 6, left : left + 4] = 255
    assert (got == 255).all()  # the ground, and the empty place
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_colours_are_kept_and_values_clipped(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0], image[0, 1], image[0, 2] = 3.0, -1.0, -0.5
    save_grid(tmp_path / "grid.png", image, 8, enlarge=3)
    got = _read(tmp_path / "grid.png")
    assert got.shape == (6 + 2 * GAP_PIXELS, 6 + 2 * GAP_PIXELS, 3)
    assert (got[GAP_PIXELS:-GAP_PIXELS, GAP_PIXELS:-GAP_PIXELS] == (255, 0, 64)).all()


def test_frames_of_a_video_stand_side_by_side(tmp_path: Path) -> None:
    video = torch.full((2, 1, 3, 4, 5), -1.0)
    for video_number in range(2):
        for frame in range(3):
            video[video_number, :, frame, 0, frame] = 1.0
    save_grid(tmp_path / "grid.png", video, 1)
    got = _read(tmp_path / "grid.png")[..., 0]
    assert got.shape == (2 * 4 + 3 * GAP_PIXELS, 3 * 5 + 2 * GAP_PIXELS)
    for top in (GAP_PIXELS, 2 * GAP_PIXELS + 4):
        tile = got[top : top + 4, GAP_PIXELS:-GAP_PIXELS]
        assert np.argwhere(tile == 255).tolist() == [[0, 0], [0, 6], [0, 12]]


def test_latents_show_their_first_channel_and_labels_stand_below(tmp_path: Path) -> None:
    latents = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    latents[:, 1:] = -1
    save_grid(tmp_path / "grid.png", latents, 2, ["0", "1"], enlarge=2)
    got = _read(tmp_path / "grid.png")
    assert got.shape[0] == 16 + LABEL_PIXELS + 2 * GAP_PIXELS
    assert (got[GAP_PIXELS : GAP_PIXELS + 16, GAP_PIXELS : GAP_PIXELS + 16] == 128).all()
    below = got[GAP_PIXELS + 16 : -GAP_PIXELS]
    assert (below < 128).any()
    save_grid(tmp_path / "other.png", latents, 2, ["0", "7"], enlarge=2)
    other = _read(tmp_path / "other.png")
    different = np.argwhere((got != other).any(-1))
    assert different[:, 0].min() >= GAP_PIXELS + 16
    assert different[:, 1].min() >= GAP_PIXELS + 16 + GAP_PIXELS


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    images, path = torch.zeros(2, 1, 4, 4), tmp_path / "grid.png"
    with pytest.raises(ConfigError, match="columns=0"):
        save_grid(path, images, 0)
    with pytest.raises(ConfigError, match="0 images"):
        save_grid(path, images[:0], 1)
    with pytest.raises(ConfigError, match="1 labels for 2 images"):
        save_grid(path, images, 1, ["a"])
    with pytest.raises(ConfigError, match="NaN or infinity"):
        save_grid(path, images / 0, 1)
    with pytest.raises(ConfigError, match="neither images nor videos"):
        save_grid(path, images[0], 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the picture"):
        save_grid(tmp_path / "file" / "grid.png", images, 1)
    assert not path.exists()
