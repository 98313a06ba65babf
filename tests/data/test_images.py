"""Images of the packages: values, pieces, splits, mixtures, and what the fingerprint covers."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from trinity.core.errors import DataError
from trinity.core.images_config import ImagesConfig
from trinity.data import pixels
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import ImageDataset, build_images

DIGITS = {"name": "digits", "format": "digits"}
PHOTOS = {"name": "photos", "format": "photos"}


def _config(*sources: dict[str, Any], **values: Any) -> ImagesConfig:
    return ImagesConfig.model_validate({"sources": sources, "height": 16, "width": 16, **values})


def _build(
    *sources: dict[str, Any], channels: int = 1, seed: int = 0, **values: Any
) -> ImageDataset:
    return build_images(_config(*sources, **values), channels=channels, seed=seed)


def test_digits_are_those_of_the_package_enlarged() -> None:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    dataset = _build(DIGITS, held_out_fraction=0.0, height=8, width=8)
    assert (dataset.num_images(TRAIN), dataset.num_images(HELD_OUT)) == (1797, 0)
    assert dataset.class_names == tuple("0123456789")
    for number in (0, 5, 1796):
        image, label = dataset.read(TRAIN, number)
        assert_close(image[0], torch.tensor(bunch.images[number] / 8 - 1, dtype=torch.float32))
        assert label == bunch.target[number]
    large, _ = _build(DIGITS, held_out_fraction=0.0, channels=3, height=16, width=24).read(TRAIN, 5)
    assert large.shape == (3, 16, 24)
    assert large.dtype == torch.float32
    assert torch.equal(large[0], large[2])
    # Bilinear, pixel centres aligned: the middle of the first two pixels is at 3/4 and 1/4.
    small = torch.tensor(bunch.images[5] / 8 - 1, dtype=torch.float32)
    rows = 0.75 * small[:-1] + 0.25 * small[1:]
    assert_close(large[0, 1:-1:2, 1], rows[:, 0])


def test_splits_share_nothing_and_do_not_depend_on_the_seed() -> None:
    one, other = (
        _build(DIGITS, held_out_fraction=0.1),
        _build(DIGITS, seed=5, held_out_fraction=0.1),
    )
    source = one.sources[0]
    train, held_out = (set(source.items[split].tolist()) for split in (TRAIN, HELD_OUT))
    assert train | held_out == set(range(1797))
    assert not train & held_out
    assert 130 < len(held_out) < 230
    assert held_out == set(other.sources[0].items[HELD_OUT].tolist())
    assert {one.read(HELD_OUT, i)[1] for i in range(len(held_out))} == set(range(10))


def test_pieces_are_cut_from_pictures_without_resizing() -> None:
    dataset = _build(PHOTOS, channels=3, crops_per_image=20, held_out_fraction=0.1)
    assert dataset.class_names == ("china", "flower")
    assert (dataset.num_images(TRAIN), dataset.num_images(HELD_OUT)) == (40, 4)
    from sklearn.datasets import load_sample_images

    bunch: Any = load_sample_images()
    for split, columns in ((TRAIN, slice(0, 576)), (HELD_OUT, slice(576, 640))):
        for number in range(0, dataset.num_images(split), 3):
            image, label = dataset.read(split, number)
            assert isinstance(label, int)
            found = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            windows = np.lib.stride_tricks.sliding_window_view(
                bunch.images[label][:, columns], (16, 16), axis=(0, 1)
            )
            same = (windows[..., 0, 0] == found[0, 0]).all(-1)
            assert any(
                (windows[i, j].transpose(1, 2, 0) == found).all() for i, j in np.argwhere(same)
            )


def test_pieces_depend_on_seed_picture_and_number_alone() -> None:
    few = _build(PHOTOS, channels=3, crops_per_image=4, held_out_fraction=0.0)
    many = _build(PHOTOS, channels=3, crops_per_image=9, held_out_fraction=0.0)
    other = _build(PHOTOS, channels=3, crops_per_image=4, seed=1, held_out_fraction=0.0)
    for picture in range(2):
        for crop in range(4):
            piece, label = few.read(TRAIN, picture * 4 + crop)
            assert label == picture
            assert torch.equal(piece, many.read(TRAIN, picture * 9 + crop)[0])
            assert not torch.equal(piece, other.read(TRAIN, picture * 4 + crop)[0])
    pieces = [few.read(TRAIN, i)[0].numpy().tobytes() for i in range(8)]
    assert len(set(pieces)) == 8


def test_pieces_come_from_everywhere_in_a_picture() -> None:
    """Of a picture whose pixels are numbered: 3 x 4 places for a piece, none more likely."""
    picture = np.arange(30, dtype=np.uint8).reshape(5, 6, 1)

    def place(seed: int, number: int, crop: int) -> int:
        cut = pixels.piece(picture, 3, 3, seed=seed, number=number, crop=crop)[..., 0]
        assert (cut - cut[0, 0]).tolist() == [[0, 1, 2], [6, 7, 8], [12, 13, 14]]
        return int(cut[0, 0])

    places = Counter(place(0, 0, crop) for crop in range(600))
    assert sorted(places) == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15]
    assert all(25 < count < 80 for count in places.values())
    first = [place(0, 0, crop) for crop in range(20)]
    assert first != [place(0, 1, crop) for crop in range(20)]
    assert first != [place(1, 0, crop) for crop in range(20)]


def test_every_picture_of_scikit_image_is_there_and_small_ones_are_enlarged() -> None:
    source = {"name": "s", "format": "skimage"}
    dataset = _build(source, channels=3, crops_per_image=1, height=128, width=160)
    assert dataset.num_classes == 22
    assert dataset.num_images(TRAIN) == 22
    assert dataset.num_images(HELD_OUT) == 21  # one is too narrow for a strip of its own
    for number in range(22):
        image, label = dataset.read(TRAIN, number)
        assert image.shape == (3, 128, 160)
        assert label == number
        assert -1 <= float(image.min()) < float(image.max()) <= 1


def test_whole_pictures_are_resized_about_their_middle() -> None:
    dataset = _build(
        {**PHOTOS, "crop": "whole"}, channels=3, held_out_fraction=0.0, height=8, width=8
    )
    assert dataset.num_images(TRAIN) == 2
    middle = np.zeros((10, 30, 1), dtype=np.uint8)
    middle[:, 10:20] = 255
    assert (pixels.fitted(middle, 5, 5)[:, 1:-1] == 255).all()
    assert (pixels.fitted(middle, 5, 5) > 200).all()
    ramp = np.repeat(np.arange(30, dtype=np.uint8)[None, :, None], 20, 0)
    assert pixels.fitted(ramp, 10, 15)[5, 2:-2, 0].tolist() == [2 * i + 1 for i in range(2, 13)]


def test_colours_become_luminance_and_gray_is_repeated() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    gray = pixels.to_pixels(colours, 1)
    assert_close(gray[0, 0], torch.tensor([0.299, 0.587, 0.114, 1.0]) * 2 - 1)
    ours = ((gray + 1) * 127.5).round()[0]
    assert ours.tolist() == np.asarray(Image.fromarray(colours).convert("L")).tolist()
    repeated = pixels.to_pixels(np.array([[[0], [255]]], dtype=np.uint8), 3)
    assert repeated.tolist() == [[[-1.0, 1.0]]] * 3


def test_odd_kinds_of_pictures_are_shown_as_a_viewer_would() -> None:
    def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert pixels.decode(encoded(deep), "it")[..., 0].tolist() == [[0, 100, 255]]
    clear = Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8))
    assert pixels.decode(encoded(clear), "it").tolist() == [[[255] * 3, [9] * 3]]
    veiled = Image.fromarray(np.array([[[40, 255], [40, 0]]], dtype=np.uint8), "LA")
    assert pixels.decode(encoded(veiled), "it")[..., 0].tolist() == [[40, 255]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert pixels.decode(encoded(palette), "it").tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert pixels.decode(encoded(palette, transparency=0), "it")[0, 0].tolist() == [255] * 3
    turned = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert pixels.decode(encoded(turned, exif=exif), "it").shape == (3, 2, 1)
    bits = Image.fromarray(np.array([[True, False]]))
    assert pixels.decode(encoded(bits), "it")[..., 0].tolist() == [[255, 0]]
    measured = Image.fromarray(np.array([[0.5, 1e6]], dtype=np.float32))
    with pytest.raises(DataError, match=r"it cannot be decoded.*16 bits"):
        pixels.decode(encoded(measured, "TIFF"), "it")


def test_sources_share_classes_by_name_and_are_numbered_through() -> None:
    second = {**DIGITS, "name": "more", "weight": 2.0}
    dataset = _build(PHOTOS, DIGITS, second, crops_per_image=3, held_out_fraction=0.0)
    assert dataset.class_names == ("china", "flower", *"0123456789")
    assert dataset.num_images(TRAIN) == 6 + 2 * 1797
    image, label = dataset.read(TRAIN, 6 + 1797 + 12)
    alone, own_label = _build(DIGITS, held_out_fraction=0.0).read(TRAIN, 12)
    assert torch.equal(image, alone)
    assert isinstance(own_label, int)
    assert label == own_label + 2
    assert dataset.locate(TRAIN, 6 + 1797 + 12) == (2, 12)
    with pytest.raises(IndexError, match="image 3600 of 3600"):
        dataset.read(TRAIN, 3600)
    records = dataset.record()
    assert [r["num_images"][TRAIN] for r in records] == [6, 1797, 1797]
    assert [r["num_classes"] for r in records] == [2, 10, 10]


def test_fingerprint_covers_all_that_changes_the_stream() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"channels": 3},
        {"height": 24},
        {"crops_per_image": 3},
        {"held_out_fraction": 0.3},
        {"lanes": 4},
        {"flip": True},
        {"coarse_shares": (0.5, 0.5)},
    ]
    base = {"crops_per_image": 2, "held_out_fraction": 0.1}
    prints = [_build(PHOTOS, **{**base, **change}).fingerprint for change in changes]
    prints += [
        _build({**PHOTOS, **own}, **base).fingerprint
        for own in ({"weight": 2.0}, {"crop": "whole"})
    ]
    prints.append(_build(PHOTOS, DIGITS, **base).fingerprint)
    assert len(set(prints)) == len(prints)
    assert _build(PHOTOS, **base, decode_threads=2).fingerprint == prints[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.channels=2; only latents"):
        _build(DIGITS, channels=2)
    with pytest.raises(DataError, match=r"no training image.*held_out_fraction"):
        _build(DIGITS, held_out_fraction=1.0)
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"path": "here"}, {}, "path='here' with format='digits'"),
        ({"format": "folder"}, {}, "path='' with format='folder'"),
        ({"crop": "random"}, {}, "crop='random' cannot be with format='digits'"),
        ({}, {"frames": 4}, "frames=4 needs sources of format latents"),
        ({"format": "latents", "path": "x"}, {"flip": True}, "mirrored latent"),
        ({}, {"coarse_shares": (0.0, 0.0)}, "leave no patch scale"),
        ({}, {"skip_rows": [(4, 8), (6, 9)]}, "ascend"),
    ]
    for own, values, message in refused:
        with pytest.raises(ValueError, match=message):
            _config({**DIGITS, **own}, **values)
    with pytest.raises(ValueError, match="differ from one another"):
        _config(DIGITS, DIGITS)
