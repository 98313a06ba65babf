"""Token shards: byte-compatible with megatron-core in both directions, damage found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from trinity.core.errors import DataError
from trinity.data.indexed import IndexedDocuments, token_dtype, write_shard

DOCUMENTS = [[1, 2, 3], [4], list(range(5, 105)), [7, 8]]


@pytest.mark.parametrize("vocab_size", [1000, 200_000])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype == (np.uint16 if vocab_size == 1000 else np.int32)
    write_shard(tmp_path / "x", DOCUMENTS, dtype, {})
    theirs = IndexedDataset(str(tmp_path / "x"))
    assert len(theirs) == len(DOCUMENTS)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    for number, document in enumerate(DOCUMENTS):
        assert theirs[number].tolist() == document


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_bytes_are_megatrons_bytes(tmp_path: Path, dtype: type[np.generic]) -> None:
    write_shard(tmp_path / "ours", DOCUMENTS, dtype, {})
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"ours.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes(), suffix


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4, 5], dtype=np.int32), [2, 3])
    builder.add_document(np.array([6], dtype=np.int32), [1])
    builder.finalize(str(tmp_path / "x.idx"))
    ours = IndexedDocuments(tmp_path / "x")
    assert [ours.document(i).tolist() for i in range(len(ours))] == [[1, 2, 3, 4, 5], [6]]
    assert ours.num_tokens == 6


def test_sidecar_describes_and_verifies(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", DOCUMENTS, np.uint16, {"tokenizer_sha256": "abc"})
    sidecar = IndexedDocuments(tmp_path / "x").verify()
    assert sidecar["num_documents"] == 4
    assert sidecar["num_tokens"] == 106
    assert sidecar["tokenizer_sha256"] == "abc"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncation_is_found_at_opening(tmp_path: Path, suffix: str) -> None:
    write_shard(tmp_path / "x", DOCUMENTS, np.uint16, {})
    file = tmp_path / f"x.{suffix}"
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(DataError, match=rf"x\.{suffix} is damaged.*delete the shard"):
        IndexedDocuments(tmp_path / "x")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_flipped_bit_is_found_by_verify(tmp_path: Path, suffix: str) -> None:
    write_shard(tmp_path / "x", DOCUMENTS, np.uint16, {})
    file = tmp_path / f"x.{suffix}"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.{suffix} is damaged"):
        IndexedDocuments(tmp_path / "x").verify()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        IndexedDocuments(tmp_path / "x")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(b"not an index, but long enough to hold a header")
    with pytest.raises(DataError, match="not a Megatron index"):
        IndexedDocuments(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(b"short")
    with pytest.raises(DataError, match="less than its header"):
        IndexedDocuments(tmp_path / "x")
    write_shard(tmp_path / "y", DOCUMENTS, np.uint16, {})
    (tmp_path / "y.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match=r"y\.json"):
        IndexedDocuments(tmp_path / "y").verify()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> object:
        yield [1, 2]
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_shard(tmp_path / "x", documents(), np.uint16, {})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
