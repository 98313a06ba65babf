"""Reading torch.distributed.checkpoint directories without executing anything they contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trinity.core.errors import CheckpointError

METADATA_FILE = ".metadata"
# `.metadata` is a pickle; these are the only names it needs.
ALLOWED_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"}
    | {str(v).split(".")[1] for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{METADATA_FILE} wants to load {module}.{name}, which no checkpoint of ours contains; "
            "the checkpoint is foreign or hostile and was not read"
        )


class SafeReader(FileSystemReader):
    """A FileSystemReader that unpickles a fixed set of classes and reads tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata. Raises CheckpointError when it is anything else."""
        directory = Path(self.path)
        try:
            with (directory / METADATA_FILE).open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (
            OSError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ValueError,
            TypeError,
            IndexError,
            KeyError,
        ) as error:
            raise CheckpointError(
                f"{directory / METADATA_FILE} is not readable: {error!r}"
            ) from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise CheckpointError(f"{directory / METADATA_FILE} holds no checkpoint metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{directory}: entry {name} is not a tensor; refused")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(
                    f"{directory}: {METADATA_FILE} points to {info.relative_path!r} outside it"
                )
            # Transforms name codecs to run over the data; ours have none.
            if info.transform_descriptors:
                raise CheckpointError(f"{directory}: stored with transforms; refused")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata
