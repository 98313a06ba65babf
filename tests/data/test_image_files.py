"""Images and latents of the user's own, in files written here; and what is wrong with files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trinity.core.errors import ConfigError, DataError
from trinity.core.images_config import ImagesConfig
from trinity.data import image_sources, pixels
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import ImageDataset, build_images


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def _build(root: Path, *, channels: int = 3, **values: Any) -> ImageDataset:
    source = {"name": "own", "format": "folder", "path": str(root / "own")}
    source |= {k: values.pop(k) for k in list(values) if k in {"format", "path", "image_key"}}
    source |= {k: values.pop(k) for k in list(values) if k in {"label_key", "crop"}}
    config = {"height": 4, "width": 4, "held_out_fraction": 0.0, "cache_dir": str(root / "cache")}
    return build_images(
        ImagesConfig.model_validate({**config, "sources": [source], **values}),
        channels=channels,
        seed=0,
    )


def _picture(value: int, height: int = 4, width: int = 4) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


def _encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    _picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def _folder(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = root / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(10 * number, 4, 6).save(path)


def _values(dataset: ImageDataset, split: str = TRAIN) -> list[tuple[int, Any]]:
    """(first pixel as stored, condition) of every image."""
    items = [dataset.read(split, i) for i in range(dataset.num_images(split))]
    return [(round((float(image[0, 0, 0]) + 1) * 127.5), condition) for image, condition in items]


def test_folder_has_a_class_per_subfolder(root: Path) -> None:
    _folder(root, ["b/one.png", "a/two.jpg", "b/three.png"])
    (root / "own" / "notes.txt").write_text("not a picture")
    dataset = _build(root)
    assert dataset.class_names == ("a", "b")
    assert sorted(_values(dataset)) == [(0, 1), (10, 0), (20, 1)]
    assert dataset.record()[0]["num_files"] == 3
    image, _ = dataset.read(TRAIN, 0)
    assert (image.shape, image.dtype) == ((3, 4, 4), torch.float32)


def test_flat_folder_has_no_classes_and_metadata_may_give_them(root: Path) -> None:
    _folder(root, ["one.png", "two.png"])
    flat = _build(root)
    assert (flat.num_classes, _values(flat)) == (0, [(0, -1), (10, -1)])
    lines = [{"file_name": "one.png", "kind": "cat"}, {"file_name": "two.png", "kind": None}]
    metadata = root / "own" / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    labelled = _build(root, label_key="kind")
    assert labelled.class_names == ("cat",)
    assert _values(labelled) == [(0, 0), (10, -1)]
    assert labelled.fingerprint != _build(root).fingerprint != flat.fingerprint
    with pytest.raises(DataError, match=r"no column 'sort'; its columns are \['image', 'kind'\]"):
        _build(root, label_key="sort")


def test_held_out_files_are_chosen_by_name(root: Path) -> None:
    names = [f"c/{i}.png" for i in range(20)]
    _folder(root, names)
    before = _build(root, held_out_fraction=0.4, crop="random", crops_per_image=3)
    assert before.num_images(TRAIN) + before.num_images(HELD_OUT) == 60
    train, held_out = ({v for v, _ in _values(before, split)} for split in (TRAIN, HELD_OUT))
    assert not train & held_out  # all pieces of a picture are on one side
    assert min(len(train), len(held_out)) >= 3
    _picture(255).save(root / "own/c/a-new-one.png")
    after = _build(root, held_out_fraction=0.4)
    assert {v for v, _ in _values(after, HELD_OUT)} - {255} == held_out


def test_a_changed_file_is_noticed(root: Path) -> None:
    _folder(root, ["a/one.bmp", "b/two.bmp"])
    before = _build(root).fingerprint
    assert _build(root).fingerprint == before
    moved = root / "moved"
    (root / "own").rename(moved)
    assert _build(root, path=str(moved)).fingerprint == before
    moved.rename(root / "own")
    one = root / "own/a/one.bmp"
    stamp = one.stat()
    _picture(99, 4, 6).save(one)
    assert one.stat().st_size == stamp.st_size
    os.utime(one, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert _build(root).fingerprint != before
    _picture(0, 4, 6).save(one)
    assert _build(root).fingerprint == before
    one.rename(root / "own/b/one.bmp")
    assert _build(root).fingerprint != before


def test_a_large_source_is_known_by_names_sizes_and_classes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sources, "HASH_BELOW_BYTES", 10)
    _folder(root, ["one.bmp", "two.bmp"])
    metadata = root / "own" / "metadata.csv"
    metadata.write_text("file_name,label\none.bmp,0\ntwo.bmp,1\n")
    before = _build(root).fingerprint
    _picture(99, 4, 6).save(root / "own/one.bmp")
    assert _build(root).fingerprint == before  # reading terabytes at every start would be worse
    metadata.write_text("file_name,label\none.bmp,1\ntwo.bmp,0\n")
    assert _build(root).fingerprint != before
    metadata.write_text("file_name,label\none.bmp,0\ntwo.bmp,1\n")
    assert _build(root).fingerprint == before
    _picture(0, 4, 8).save(root / "own/one.bmp")
    assert _build(root).fingerprint != before


def test_damaged_pictures_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(root, ["a/one.png", "a/two.png"])
    (root / "own/a/two.png").write_bytes(b"GIF89a, said the file")
    with pytest.raises(DataError, match=r"a/two\.png cannot be decoded as a picture.*remove it"):
        _build(root)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "own/a/two.png")
    whole = (root / "own/a/two.png").read_bytes()
    (root / "own/a/two.png").write_bytes(whole[: len(whole) // 2])
    dataset = _build(root)
    dataset.read(TRAIN, 0)
    with pytest.raises(DataError, match=r"a/two\.png cannot be decoded as a picture"):
        dataset.read(TRAIN, 1)
    (root / "own/a/two.png").unlink()
    with pytest.raises(DataError, match=r"a/two\.png cannot be decoded"):
        dataset.read(TRAIN, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match="decompression bomb"):
        pixels.decode(_encoded(3), "it")


def test_missing_folders_and_packages_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"path='.*own' is no directory"):
        _build(root)
    (root / "own").mkdir()
    (root / "own/notes.txt").write_text("nothing to see")
    with pytest.raises(DataError, match="data source 'own'"):
        _build(root)
    with pytest.raises(DataError, match="matches no file"):
        _build(root, format="parquet", path=str(root / "*.parquet"))
    with pytest.raises(ConfigError, match=r"no_such_package is not installed.*\[images\]"):
        pixels.need("no_such_package")


def _parquet(root: Path, columns: dict[str, Any], name: str = "own.parquet") -> dict[str, Any]:
    pq.write_table(pa.table(columns), root / name)
    return {"format": "parquet", "path": str(root / "own*.parquet")}


def test_parquet_of_encoded_images(root: Path) -> None:
    struct = [{"bytes": _encoded(v), "path": None} for v in (7, 8, 9)]
    where = _parquet(root, {"image": struct, "label": [2, 0, None]})
    dataset = _build(root, **where)
    assert dataset.class_names == ("0", "1", "2")
    assert _values(dataset) == [(7, 2), (8, 0), (9, -1)]
    before = dataset.fingerprint
    _parquet(root, {"image": struct[:1], "label": [1]}, "own2.parquet")
    assert _values(_build(root, **where)) == [(7, 2), (8, 0), (9, -1), (7, 1)]
    (root / "own2.parquet").unlink()
    names = {"picture": [_encoded(v) for v in (7, 8)], "kind": ["dog", "cat"]}
    plain = _build(root, **_parquet(root, names), image_key="picture", label_key="kind")
    assert plain.class_names == ("cat", "dog")
    assert _values(plain) == [(7, 1), (8, 0)]
    assert plain.fingerprint != before
    assert _values(_build(root, **where, image_key="picture", label_key="")) == [(7, -1), (8, -1)]


def test_parquet_written_by_datasets_keeps_its_class_names(root: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [_picture(5), _picture(6)], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "own.parquet"))
    dataset = _build(root, format="parquet", path=str(root / "own.parquet"))
    assert dataset.class_names == ("cat", "dog")
    assert _values(dataset) == [(5, 1), (6, 0)]


def test_embeddings_are_conditions(root: Path) -> None:
    columns = {"image": [_encoded(1), _encoded(2)], "text": [[0.5, 1.0, -2.0], [3.0, 4.0, 5.0]]}
    dataset = _build(root, **_parquet(root, columns), label_key="text")
    assert (dataset.num_classes, dataset.embedding_width) == (0, 3)
    assert [c.tolist() for _, c in _values(dataset)] == columns["text"]
    columns["text"][1] = [1.0]
    uneven = _build(root, **_parquet(root, columns), label_key="text")
    with pytest.raises(DataError, match="lists of other lengths than 3: row 1"):
        uneven.read(TRAIN, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"no picture"]}, r"row 0, column 'image' cannot be decoded"),
        ({"image": ["file.png"]}, r"holds str, not an encoded image; set image_key"),
        ({"picture": [b"x"]}, r"no column 'image'; its columns are \['picture'\]; set image_key"),
        ({"image": [b"x"], "label": [-2]}, r"'label' holds -2, which numbers no class"),
        ({"image": [b"x"], "label": [1 << 40]}, r"holds 1099511627776, which numbers no class"),
        ({"image": [b"x"], "label": [0.5]}, r"'label' holds 0\.5, which numbers no class"),
    ],
)
def test_odd_parquet_is_refused(root: Path, columns: dict[str, Any], message: str) -> None:
    if "label" in columns:
        columns = {**columns, "image": [_encoded(1)]}
    with pytest.raises(DataError, match=message):
        _build(root, **_parquet(root, columns))


def test_damaged_parquet_is_named(root: Path) -> None:
    where = _parquet(root, {"image": [_encoded(1)]})
    (root / "own.parquet").write_bytes((root / "own.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"data source 'own': cannot read .*own\*\.parquet"):
        _build(root, **where)


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_latents_are_read_as_they_were_stored(root: Path, frames: int, kind: str) -> None:
    shape = (2, *([frames] if frames else []), 4, 6)
    latents = torch.randn(5, *shape)
    labels = torch.tensor([3, 0, 1, -1, 2])
    if kind == "safetensors":
        save_file({"latents": latents[:2], "labels": labels[:2]}, root / "0.safetensors")
        save_file({"latents": latents[2:], "labels": labels[2:]}, root / "1.safetensors")
    else:
        table = {"latents": latents.tolist(), "label": labels.tolist()}
        pq.write_table(pa.table(table), root / "a.parquet")
    dataset = _build(root, channels=2, format="latents", path=str(root), frames=frames, width=6)
    assert dataset.num_classes == 4
    for number in (4, 0, 2, 1, 3):
        latent, label = dataset.read(TRAIN, number)
        assert torch.equal(latent, latents[number])
        assert label == int(labels[number])


def test_latents_of_half_precision_with_embeddings(root: Path) -> None:
    latents, embeddings = torch.randn(3, 2, 4, 4).bfloat16(), torch.randn(3, 7)
    path = root / "own.safetensors"
    save_file({"latents": latents, "embeddings": embeddings, "labels": torch.zeros(3).int()}, path)
    where: dict[str, Any] = {"format": "latents", "path": str(path)}
    dataset = _build(root, channels=2, **where)
    assert (dataset.embedding_width, dataset.num_classes) == (7, 0)
    latent, condition = dataset.read(TRAIN, 1)
    assert torch.equal(latent, latents[1].float())
    assert torch.equal(torch.as_tensor(condition), embeddings[1])
    before = dataset.fingerprint
    save_file({"latents": latents, "embeddings": embeddings + 1}, path)
    assert _build(root, channels=2, **where).fingerprint != before


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents": torch.zeros(2, 1, 4, 4)}, r"shape \(1, 4, 4\), where .*ask for \(2, 4, 4\)"),
        ({"latents": torch.zeros(2, 2, 3, 4, 4)}, r"ask for \(2, 4, 4\)"),
        ({"latents": torch.full((2, 2, 4, 4), torch.nan)}, "NaN or infinity"),
        ({"latents": torch.zeros(2, 4)}, r"must hold latents \(N, C, H, W\)"),
        ({"latents": torch.zeros(0, 2, 4, 4)}, r"must hold latents"),
        ({"images": torch.zeros(2, 2, 4, 4)}, r"its tensors are {'images': \(2, 2, 4, 4\)}"),
        ({"latents": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(3)}, "must hold latents"),
        (
            {"latents": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(2)},
            "holds 0.0, which numbers",
        ),
    ],
)
def test_odd_latents_are_refused(root: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, root / "own.safetensors")
    with pytest.raises(DataError, match=message):
        _build(root, channels=2, format="latents", path=str(root))


def test_latents_of_several_kinds_are_refused(root: Path) -> None:
    (root / "own.safetensors").write_bytes(b"not whole")
    with pytest.raises(DataError, match=r"own\.safetensors is no whole safetensors file"):
        _build(root, channels=2, format="latents", path=str(root))
    save_file({"latents": torch.zeros(1, 2, 4, 4)}, root / "own.safetensors")
    both = {"latents": torch.zeros(1, 2, 4, 4), "embeddings": torch.zeros(1, 3)}
    save_file(both, root / "two.safetensors")
    with pytest.raises(DataError, match=r"widths \[0, 3\] in one source"):
        _build(root, channels=2, format="latents", path=str(root))
    pq.write_table(pa.table({"latents": [[[[0.0]]]]}), root / "own.parquet")
    with pytest.raises(DataError, match=r"not \['parquet', 'safetensors'\]"):
        _build(root, channels=2, format="latents", path=str(root))
