"""Token shards in Megatron's ``.bin`` / ``.idx`` format, memory-mapped, with a JSON sidecar.

``.idx``: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1, i32
length of each sequence, i64 byte offset of each, i64 index of each document's first sequence.
``.bin``: the tokens, end to end. Here every sequence is one document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trinity.core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
SIDECAR_FORMAT = 1
Ints = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
UINT16_MAX_VOCABULARY = 65_500
"""Megatron's own limit below which it stores uint16."""


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Smallest dtype Megatron uses for a vocabulary of this size."""
    return np.uint16 if vocab_size < UINT16_MAX_VOCABULARY else np.int32


def bin_path(prefix: Path) -> Path:
    """The token file of a shard."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a shard."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: Path) -> Path:
    """The description of a shard."""
    return Path(f"{prefix}.json")


class IndexedWriter:
    """Writes one shard; nothing under its final name exists before :meth:`finish`."""

    def __init__(self, prefix: str | Path, dtype: type[np.generic]) -> None:
        self.prefix = Path(prefix)
        self._dtype = np.dtype(dtype)
        self._lengths: list[int] = []
        self._hash = hashlib.sha256()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(f"{self.prefix}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")

    def add(self, tokens: Sequence[int]) -> None:
        """Append one document."""
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(tokens))

    def finish(self, description: dict[str, Any]) -> None:
        """Write index and sidecar, then move all three into place, the sidecar last."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._index_bytes()
        sidecar = {
            "format": SIDECAR_FORMAT,
            "num_documents": len(self._lengths),
            "num_tokens": sum(self._lengths),
            "bin_sha256": self._hash.hexdigest(),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
            **description,
        }
        os.replace(self._temporary, bin_path(self.prefix))
        _write_atomically(idx_path(self.prefix), index)
        text = json.dumps(sidecar, indent=2) + "\n"
        _write_atomically(sidecar_path(self.prefix), text.encode())

    def discard(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def _index_bytes(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype=np.int32)
        sizes = lengths.astype(np.int64) * self._dtype.itemsize
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(lengths) else sizes
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        code = next(c for c, dtype in DTYPE_CODES.items() if np.dtype(dtype) == self._dtype)
        header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
        return header + lengths.tobytes() + offsets.astype(np.int64).tobytes() + documents.tobytes()


class IndexedDocuments:
    """Reads a shard: documents by number, memory-mapped.

    Opening checks the sizes of both files against the index, so that a truncated shard is found
    at start; :meth:`verify` also compares SHA-256 with the sidecar. Raises DataError.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a shard needs both .bin and .idx")
        index = idx_path(self.prefix).read_bytes()
        dtype, num_sequences, num_documents = self._read_header(index)
        start = HEADER.size
        expected = start + num_sequences * 12 + num_documents * 8
        if len(index) != expected:
            raise self._damaged(idx_path(self.prefix), f"{len(index)} bytes instead of {expected}")
        lengths = np.frombuffer(index, np.int32, num_sequences, start)
        offsets = np.frombuffer(index, np.int64, num_sequences, start + 4 * num_sequences)
        documents = np.frombuffer(index, np.int64, num_documents, start + 12 * num_sequences)
        if not _is_sound(lengths, documents, num_sequences):
            raise self._damaged(idx_path(self.prefix), "lengths or documents out of range")
        first, last = documents[:-1], documents[1:]
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.lengths = ends[last] - ends[first]
        """Tokens of each document."""
        self.starts = ends[first]
        """First token of each document in ``tokens``."""
        size = int(ends[-1]) * dtype.itemsize
        found = bin_path(self.prefix).stat().st_size
        if found != size:
            raise self._damaged(bin_path(self.prefix), f"{found} bytes instead of {size}")
        if not np.array_equal(offsets, ends[:-1] * dtype.itemsize):
            raise self._damaged(idx_path(self.prefix), "offsets that are not end to end")
        self.tokens: np.ndarray[Any, Any] = (
            np.memmap(bin_path(self.prefix), dtype, "r") if size else np.zeros(0, dtype)
        )
        self._file = bin_path(self.prefix).open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> np.ndarray[Any, Any]:
        """Tokens of one document."""
        start = self.starts[number]
        return self.tokens[start : start + self.lengths[number]]

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Tokens ``first`` .. ``first + count`` of the shard.

        Asks the file instead of the map: where a shard was cut short while in use, or the file
        system lost it, a map ends the process without a word (SIGBUS). Raises DataError then.
        """
        path, dtype = bin_path(self.prefix), self.tokens.dtype
        wanted = int(count) * dtype.itemsize
        try:
            data = os.pread(self._file.fileno(), wanted, int(first) * dtype.itemsize)
        except OSError as error:
            raise DataError(f"{path} cannot be read any more: {error}; {REMEDY}") from None
        if len(data) != wanted:
            raise self._damaged(path, f"ended before token {first + count}, while it was in use")
        return np.frombuffer(data, dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def verify(self) -> dict[str, Any]:
        """Compare both files with the sidecar's SHA-256 and return the sidecar."""
        path = sidecar_path(self.prefix)
        try:
            sidecar = dict(json.loads(path.read_text(encoding="utf-8")).items())
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is missing or unreadable: {error}; {REMEDY}") from None
        for key, file in (
            ("bin_sha256", bin_path(self.prefix)),
            ("idx_sha256", idx_path(self.prefix)),
        ):
            if sidecar.get(key) != file_sha256(file):
                raise self._damaged(file, f"contents that do not match {key} of {path.name}")
        return sidecar

    def _read_header(self, index: bytes) -> tuple[np.dtype[Any], int, int]:
        path = idx_path(self.prefix)
        if len(index) < HEADER.size:
            raise self._damaged(path, f"{len(index)} bytes, less than its header")
        magic, version, code, num_sequences, num_documents = HEADER.unpack_from(index)
        if magic != MAGIC or version != VERSION or code not in DTYPE_CODES:
            raise DataError(
                f"{path} is not a Megatron index of version {VERSION}; check data.sources"
            )
        return np.dtype(DTYPE_CODES[code]), num_sequences, num_documents

    @staticmethod
    def _damaged(path: Path, what: str) -> DataError:
        return DataError(f"{path} is damaged: it has {what}; {REMEDY}")


def _is_sound(lengths: Ints, documents: Ints, num_sequences: int) -> bool:
    """Whether an index could be true: a flipped bit must not lead outside the file."""
    ends = (int(documents[0]), int(documents[-1])) if len(documents) else None
    return (
        ends == (0, num_sequences)
        and not (lengths < 0).any()
        and not (np.diff(documents) < 0).any()
    )


REMEDY = "delete the shard so that it is built again, or restore it"


def write_shard(
    prefix: Path,
    documents: Iterable[Sequence[int]],
    dtype: type[np.generic],
    description: dict[str, Any],
) -> None:
    """Write all ``documents`` as one shard; on any error nothing is left behind."""
    writer = IndexedWriter(prefix, dtype)
    try:
        for tokens in documents:
            writer.add(tokens)
        writer.finish(description)
    except OSError as error:
        raise DataError(f"{prefix}: cannot write the shard: {error}; free space there") from None
    finally:
        writer.discard()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
