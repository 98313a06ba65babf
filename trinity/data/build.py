"""From configured sources to token shards in a cache, keyed by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trinity.core.config import DataConfig, SourceConfig
from trinity.core.errors import DataError
from trinity.data.indexed import (
    IndexedDocuments,
    file_sha256,
    idx_path,
    sidecar_path,
    token_dtype,
    write_shard,
)
from trinity.data.sources import (
    STDLIB,
    content_sha256,
    documents,
    format_of,
    is_held_out,
    source_files,
)
from trinity.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, train_tokenizer

CACHE_VERSION = 1
TRAIN, HELD_OUT = "train", "held-out"
ENCODE_BATCH_DOCUMENTS = 256
VERIFY_BELOW_BYTES = 1 << 30
"""Shards up to this size are compared with their SHA-256 at every start; larger ones by size."""
CHECKED_TOKENS = 1 << 20


class DocumentSet:
    """Some documents of a shard."""

    def __init__(
        self, shard: IndexedDocuments, numbers: np.ndarray[Any, Any] | None = None
    ) -> None:
        self.shard = shard
        self._numbers = np.arange(len(shard)) if numbers is None else numbers
        self.lengths = shard.lengths[self._numbers]
        """Tokens of each document."""

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, document: int, start: int, length: int) -> np.ndarray[Any, Any]:
        """Tokens start .. start + length of a document; fewer where it ends earlier."""
        number = self._numbers[document]
        first = self.shard.starts[number] + start
        return self.shard.read(int(first), min(length, int(self.shard.lengths[number]) - start))


@dataclass(frozen=True)
class Source:
    """One source, tokenized."""

    name: str
    weight: float
    train: DocumentSet
    held_out: DocumentSet
    description: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """All sources of a configuration and the tokenizer they share."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 of everything that, with the seed, determines which token is where in the stream."""

    def record(self) -> list[dict[str, Any]]:
        """A description of each source, for the run's record."""
        return [source.description for source in self.sources]


def build_dataset(config: DataConfig, seed: int, model_vocab_size: int) -> Dataset:
    """Tokenize what is not in the cache yet, and open everything.

    Raises DataError for sources that are missing, unreadable, damaged or empty, and for a
    tokenizer with more entries than the model has rows.
    """
    files = {source.name: source_files(source) for source in config.sources}
    contents = {name: content_sha256(paths) for name, paths in files.items()}
    tokenizer = _tokenizer(config, files, contents)
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} entries but model.vocab_size="
            f"{model_vocab_size}; raise model.vocab_size or choose a smaller tokenizer"
        )
    sources = tuple(
        _open_source(config, source, files[source.name], contents[source.name], tokenizer)
        for source in config.sources
    )
    for source in sources:
        if not source.train.lengths.any():
            raise DataError(
                f"data source {source.name!r} has no training document; check its path, or lower "
                "data.held_out_fraction"
            )
        _check_token_range(source, model_vocab_size)
    identity = {
        "seed": seed,
        "packing": [config.packing, config.buffer_documents, config.lanes],
        "sources": [[s.name, s.weight, s.description["shards"]] for s in sources],
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Dataset(sources, tokenizer, fingerprint)


def _tokenizer(
    config: DataConfig, files: dict[str, list[Path]], contents: dict[str, str]
) -> Tokenizer:
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    assert config.tokenizer.vocab_size is not None  # the configuration has exactly one of the two
    for source in config.sources:
        if format_of(source, files[source.name][0]) == "megatron":
            raise DataError(
                f"data source {source.name!r} is tokenized already; name the tokenizer it was made "
                "with in data.tokenizer.path instead of training one"
            )
    key = _key([*contents.values(), config.tokenizer.vocab_size, config.held_out_fraction])
    directory = Path(config.cache_dir) / "tokenizers" / key
    if not (directory / TOKENIZER_FILE).is_file():
        texts = (
            text
            for source in config.sources
            for text in documents(source, files[source.name])
            if not is_held_out(text, config.held_out_fraction)
        )
        trained = train_tokenizer(texts, config.tokenizer.vocab_size)
        _publish(directory, trained.save)
    return load_tokenizer(directory)


def _open_source(
    config: DataConfig,
    source: SourceConfig,
    files: list[Path],
    content: str,
    tokenizer: Tokenizer,
) -> Source:
    kinds = {format_of(source, file) for file in files}
    if "megatron" in kinds:
        return _open_megatron(config, source, files, tokenizer)
    key = _key([content, tokenizer.sha256, source.text_key, config.held_out_fraction])
    directory = Path(config.cache_dir) / "shards" / key

    def build(target: Path) -> None:
        _tokenize(source, files, tokenizer, config.held_out_fraction, content, target)

    if not sidecar_path(directory / HELD_OUT).is_file():
        _publish(directory, build)
    sets, shards = [], []
    for name in (TRAIN, HELD_OUT):
        shard = IndexedDocuments(directory / name)
        if shard.tokens.nbytes <= VERIFY_BELOW_BYTES:
            shard.verify()
        sidecar = json.loads(sidecar_path(shard.prefix).read_text(encoding="utf-8"))
        shards.append({key: sidecar[key] for key in ("num_documents", "num_tokens", "bin_sha256")})
        sets.append(DocumentSet(shard))
    description = {
        "name": source.name,
        "path": source.path,
        "num_files": len(files),
        "content_sha256": content,
        "tokenizer_sha256": tokenizer.sha256,
        "shards": shards,
    }
    return Source(source.name, source.weight, sets[0], sets[1], description)


def _open_megatron(
    config: DataConfig, source: SourceConfig, files: list[Path], tokenizer: Tokenizer
) -> Source:
    """An existing shard, used where it lies; held out by document number."""
    if len(files) != 1:
        raise DataError(
            f"data source {source.name!r} names {len(files)} Megatron shards; list one per source"
        )
    prefix = files[0].with_suffix("")
    shard = IndexedDocuments(prefix)
    if sidecar_path(prefix).is_file():
        made_with = shard.verify().get("tokenizer_sha256")
        if made_with not in (None, tokenizer.sha256):
            raise DataError(
                f"{prefix} was tokenized with another tokenizer ({made_with:.12}) than "
                f"data.tokenizer ({tokenizer.sha256:.12}); name the right one"
            )
    chosen = np.array(
        [is_held_out(f"{source.name}/{i}", config.held_out_fraction) for i in range(len(shard))],
        dtype=bool,
    )
    description = {
        "name": source.name,
        "path": source.path,
        "num_files": 1,
        "tokenizer_sha256": tokenizer.sha256,
        "shards": [
            {
                "num_documents": len(shard),
                "num_tokens": shard.num_tokens,
                "idx_sha256": file_sha256(idx_path(prefix)),
            }
        ],
    }
    train = DocumentSet(shard, np.flatnonzero(~chosen))
    held_out = DocumentSet(shard, np.flatnonzero(chosen))
    return Source(source.name, source.weight, train, held_out, description)


def _tokenize(
    source: SourceConfig,
    files: list[Path],
    tokenizer: Tokenizer,
    held_out_fraction: float,
    content: str,
    directory: Path,
) -> None:
    for name, wanted in ((TRAIN, False), (HELD_OUT, True)):
        texts = (
            text
            for text in documents(source, files)
            if is_held_out(text, held_out_fraction) == wanted
        )
        description = {
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "source": source.name,
            "content_sha256": content,
            # File names of the standard library would carry the path of this machine.
            "files": [file.name if source.path == STDLIB else str(file) for file in files],
        }
        dtype = token_dtype(tokenizer.vocab_size)
        write_shard(directory / name, _encoded(tokenizer, texts), dtype, description)


def _encoded(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[Sequence[int]]:
    while batch := list(islice(texts, ENCODE_BATCH_DOCUMENTS)):
        yield from tokenizer.encode_documents(batch)


def _check_token_range(source: Source, model_vocab_size: int) -> None:
    """The first tokens suffice to catch a shard made with another tokenizer."""
    tokens = source.train.shard.tokens[:CHECKED_TOKENS]
    highest = int(tokens.max()) if len(tokens) else 0
    if highest >= model_vocab_size:
        raise DataError(
            f"data source {source.name!r} holds token {highest}, but model.vocab_size="
            f"{model_vocab_size}; the shard was made with another tokenizer"
        )


def _key(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:32]


def _publish(directory: Path, build: Any) -> None:
    """Build in a directory aside and rename: whoever of several processes is first wins."""
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        build(temporary)
        if directory.exists():  # left behind incomplete by something that died
            shutil.rmtree(directory)
        os.rename(temporary, directory)
    except FileExistsError:
        pass  # another process published the same content in the meantime
    except OSError as error:
        raise DataError(
            f"{directory}: cannot write the data cache: {error}; free space or set data.cache_dir"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
