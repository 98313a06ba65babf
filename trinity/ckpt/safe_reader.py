"""Reading torch.distributed.checkpoint directories without executing anything they contain.

``.metadata`` is a pickle. A list of allowed classes is not enough: a pickle may also set
attributes *on* those classes (the BUILD opcode) and so change them for the whole process. So the
pickle gets to see nothing but stand-ins made for one reading, and the real objects are built anew
from what they hold, every field checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from trinity.ckpt.manifest import is_plain_name
from trinity.core.errors import CheckpointError

METADATA_FILE = ".metadata"
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}
CALLS = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
DTYPES = {str(v).split(".")[1]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}
# What the unpickler raises for garbage; each was seen under random damage or is documented.
GARBAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def _new_record(name: str) -> type:
    """A class that only keeps the state it is given."""

    def keep(self: Any, state: object) -> None:
        self.kind, self.state = name, state

    return type(name, (), {"__setstate__": keep, "kind": None, "state": None})


def _new_call() -> Callable[..., tuple[Any, ...]]:
    """A function that only keeps its arguments."""
    return lambda *arguments: arguments


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return _new_record(name)
        if name in CALLS.get(module, ()):
            return _new_call()
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise CheckpointError(
            f"{METADATA_FILE} wants to load {module}.{name}, which no checkpoint of ours contains; "
            "the checkpoint is foreign or hostile and was not read"
        )


class SafeReader(FileSystemReader):
    """A FileSystemReader that executes nothing and reads tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata. Raises CheckpointError when it is anything else."""
        path = Path(self.path) / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _metadata(path, _MetadataUnpickler(file).load())
        except GARBAGE as error:
            raise CheckpointError(
                f"{path} holds no checkpoint metadata ({error!r}); it is damaged or foreign, take "
                "another checkpoint"
            ) from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _metadata(path: Path, record: object) -> Metadata:
    fields = _fields(record, "Metadata")
    tensors = {}
    for name, entry in fields["state_dict_metadata"].items():
        if getattr(entry, "kind", None) != "TensorStorageMetadata":
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor; refused")
        tensors[_checked(name, str)] = _tensor(_fields(entry, "TensorStorageMetadata"))
    storage = {}
    for key, info in fields["storage_data"].items():
        index, place = _fields(key, "MetadataIndex"), _fields(info, "_StorageInfo")
        if not is_plain_name(place["relative_path"]):
            raise CheckpointError(
                f"{path} points to {place['relative_path']!r} outside its directory; refused"
            )
        if place.get("transform_descriptors"):  # names of codecs to run; ours have none
            raise CheckpointError(f"{path}: stored with transforms; refused")
        where = MetadataIndex(_checked(index["fqn"], str), _size(index["offset"]))
        storage[where] = _StorageInfo(
            place["relative_path"], _checked(place["offset"], int), _checked(place["length"], int)
        )
    return Metadata(state_dict_metadata=tensors, storage_data=storage)


def _tensor(fields: dict[str, Any]) -> TensorStorageMetadata:
    dtype, *_ = _state(fields["properties"], "TensorProperties")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_checked(dtype, torch.dtype)),
        size=_size(fields["size"]),
        chunks=[
            ChunkStorageMetadata(offsets=_size(chunk["offsets"]), sizes=_size(chunk["sizes"]))
            for chunk in (_fields(c, "ChunkStorageMetadata") for c in fields["chunks"])
        ],
    )


def _size(arguments: object) -> torch.Size:
    """``torch.Size((2, 3))`` arrives as its arguments ``((2, 3),)``, a scalar's as ``()``."""
    lengths = _checked(arguments, tuple)
    return torch.Size([_checked(length, int) for part in lengths for length in part])


def _fields(record: object, kind: str) -> dict[str, Any]:
    return _checked(_state(record, kind), dict)


def _state(record: object, kind: str) -> Any:
    if getattr(record, "kind", None) != kind:
        raise TypeError(f"no {kind}")
    return record.state  # type: ignore[attr-defined]


def _checked(value: object, wanted: type) -> Any:
    if type(value) is not wanted:
        raise TypeError(f"{type(value).__name__} instead of {wanted.__name__}")
    return value
