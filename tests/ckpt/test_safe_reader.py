"""Pickled checkpoint metadata from strangers: nothing runs, nothing in the process changes."""

from __future__ import annotations

import os
import pathlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trinity.ckpt.manifest import MANIFEST_FILE, write_manifest
from trinity.ckpt.safe_reader import METADATA_FILE, SafeReader
from trinity.ckpt.store import load_checkpoint, save_checkpoint
from trinity.core.errors import CheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(2, dtype=torch.int8)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 1, _tensors(), {"step": 1}, keep_last=1)


def _replace_metadata(directory: Path, data: bytes) -> None:
    (directory / METADATA_FILE).write_bytes(data)
    (directory / MANIFEST_FILE).unlink()
    write_manifest(directory)


def _refused(directory: Path, message: str) -> None:
    loaded = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory, loaded)
    assert not any(int(tensor.count_nonzero()) for tensor in loaded.values())


def test_what_is_read_is_what_torch_wrote(saved: Path) -> None:
    theirs = pickle.loads((saved / METADATA_FILE).read_bytes())
    ours = SafeReader(saved).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


# "N" and "}...s" build (None, {name: value}): the state under which BUILD sets attributes.
def _set_attribute(target: str, name: str, value: bytes) -> bytes:
    module, attribute = target.rsplit(".", 1)
    return f"c{module}\n{attribute}\nN}}V{name}\n".encode() + value + b"s\x86b0"


@pytest.mark.parametrize(
    "target",
    [
        "pathlib.Path",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.serialization._get_layout",
    ],
)
def test_a_pickle_cannot_change_the_classes_it_may_name(saved: Path, target: str) -> None:
    """Attributes set on an allowed class would outlive the reading and disarm later checks."""
    honest = (saved / METADATA_FILE).read_bytes()
    prologue = _set_attribute(target, "name", b"Vnot_a_name\n")
    assert honest[:1] == b"\x80"
    _replace_metadata(saved, honest[:2] + prologue + pickle.dumps(pickle.loads(honest), 2)[2:])
    classes = (pathlib.Path, Metadata, TensorStorageMetadata, torch.serialization._get_layout)
    before = [dict(vars(each)) for each in classes]
    try:
        stored = SafeReader(saved).read_metadata().state_dict_metadata
    except CheckpointError:
        stored = None  # refused: as good as harmless
    assert [dict(vars(each)) for each in classes] == before
    assert stored is None or stored == pickle.loads(honest).state_dict_metadata


def test_a_pickle_that_redefines_names_reads_nothing_outside(saved: Path, tmp_path: Path) -> None:
    """With ``Path.name`` redefined, a check of plain names by it would wave everything through."""
    outside = "../../outside.distcp"
    shard = next(saved.glob("*.distcp"))
    (saved / outside).write_bytes(shard.read_bytes())
    metadata = pickle.loads((saved / METADATA_FILE).read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = outside
    prologue = _set_attribute("pathlib.Path", "name", f"V{outside}\n".encode())
    _replace_metadata(saved, b"\x80\x02" + prologue + pickle.dumps(metadata, 2)[2:])
    _refused(saved, "outside its directory")
    assert "name" not in vars(pathlib.Path)


class _Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, print, torch.load])
def test_no_function_is_called(
    saved: Path, tmp_path: Path, function: Callable[..., object]
) -> None:
    _replace_metadata(saved, pickle.dumps(_Call(function, f"touch {tmp_path}/executed")))
    _refused(saved, "foreign or hostile")
    assert not (tmp_path / "executed").exists()


def _entries(metadata: Any) -> Any:
    return metadata.state_dict_metadata["weight"]


def _infos(metadata: Any) -> list[Any]:
    return list(metadata.storage_data.values())


MALFORMED: dict[str, tuple[Callable[[Any], object], str]] = {
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", 5), "no checkpoint metadata"),
    "no storage": (lambda m: setattr(m, "storage_data", None), "no checkpoint metadata"),
    "size of floats": (lambda m: setattr(_entries(m), "size", (3.0, 4.0)), "no checkpoint meta"),
    "dtype of text": (
        lambda m: setattr(_entries(m).properties, "dtype", "float32"),
        "no checkpoint metadata",
    ),
    "chunks of text": (lambda m: setattr(_entries(m), "chunks", ["x"]), "no checkpoint metadata"),
    "entry of bytes": (lambda m: m.state_dict_metadata.update(weight=b"x"), "is not a tensor"),
    "name of bytes": (
        lambda m: m.state_dict_metadata.update({b"x": _entries(m)}),
        "no checkpoint metadata",
    ),
    "path a number": (lambda m: setattr(_infos(m)[0], "relative_path", 5), "outside its directory"),
    "path absolute": (
        lambda m: setattr(_infos(m)[0], "relative_path", "/etc/passwd"),
        "outside its directory",
    ),
    "path upwards": (lambda m: setattr(_infos(m)[0], "relative_path", ".."), "outside its dir"),
    "offset of text": (lambda m: setattr(_infos(m)[0], "offset", "0"), "no checkpoint metadata"),
    "transforms": (
        lambda m: setattr(_infos(m)[0], "transform_descriptors", ["zstd"]),
        "stored with transforms",
    ),
    "parts nowhere": (lambda m: m.storage_data.clear(), "cannot be read"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_metadata_is_refused(saved: Path, kind: str) -> None:
    tamper, message = MALFORMED[kind]
    metadata = pickle.loads((saved / METADATA_FILE).read_bytes())
    tamper(metadata)
    _replace_metadata(saved, pickle.dumps(metadata))
    _refused(saved, message)


def test_a_part_in_a_file_that_is_absent_is_a_clear_error(saved: Path) -> None:
    metadata = pickle.loads((saved / METADATA_FILE).read_bytes())
    _infos(metadata)[0].relative_path = "absent"
    _replace_metadata(saved, pickle.dumps(metadata))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(saved, loaded)


def test_random_damage_is_either_harmless_or_a_clear_error(saved: Path) -> None:
    """Bytes of the pickle overwritten at random, with a manifest that agrees."""
    honest = (saved / METADATA_FILE).read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for _ in range(300):
        data = bytearray(honest)
        for _ in range(generator.choice([1, 1, 2, 5])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (saved / METADATA_FILE).write_bytes(data)
        try:
            SafeReader(saved).read_metadata()
        except CheckpointError:
            num_refused += 1
    assert num_refused > 200
