"""Sources, cache and fingerprints: real files in, and errors that name what is wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trinity.core.config import Config, SourceConfig
from trinity.core.errors import DataError
from trinity.core.load_config import load_config
from trinity.data.build import Dataset, build_dataset
from trinity.data.indexed import write_shard
from trinity.data.sources import documents, is_held_out, source_files

LINES = [f"document number {i} with a few words" for i in range(40)]


def _config(tiny_toml: Path, path: object, cache: Path, **changes: object) -> Config:
    source = {"name": "s", "path": str(path), **changes}
    inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in source.items())
    return load_config(tiny_toml, [f"data.sources=[{{{inline}}}]", f"data.cache_dir={cache}"])


def _build(config: Config) -> Dataset:
    return build_dataset(config.data, config.seed, config.model.vocab_size)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The same forty documents in every format."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in LINES))
    pq.write_table(pa.table({"text": LINES, "id": list(range(40))}), tmp_path / "a.parquet")
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(LINES):
        (tmp_path / f"texts/{i:02d}.txt").write_text(text)
    return tmp_path


def test_every_format_gives_the_same_tokens(files: Path, tiny_toml: Path, tmp_path: Path) -> None:
    shards = []
    for path in (files / "a.jsonl", files / "a.parquet", files / "texts", files / "texts/*.txt"):
        dataset = _build(_config(tiny_toml, path, tmp_path / "cache"))
        source = dataset.sources[0]
        assert len(source.train) + len(source.held_out) == 40
        shards.append(source.description["shards"])
    assert all(shard == shards[0] for shard in shards)


def test_the_cache_is_used_and_follows_the_contents(
    files: Path, tiny_toml: Path, tmp_path: Path
) -> None:
    config = _config(tiny_toml, files / "texts", tmp_path / "cache")
    first = _build(config)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert _build(config).fingerprint == first.fingerprint
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    (files / "texts/07.txt").write_text("changed")
    assert _build(config).fingerprint != first.fingerprint


def test_the_standard_library_is_real_text() -> None:
    source = SourceConfig(name="python", path="stdlib")
    files = source_files(source)
    assert len(files) > 300
    names = {file.name for file in files}
    assert {"argparse.py", "ast.py", "typing.py"} <= names
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
    texts = list(documents(source, files[:50]))
    assert sum(map(len, texts)) > 100_000
    assert sys.version_info >= (3, 11)


def test_a_megatron_shard_is_used_where_it_lies(
    files: Path, tiny_toml: Path, tmp_path: Path
) -> None:
    first = _build(_config(tiny_toml, files / "texts", tmp_path / "cache"))
    first.tokenizer.save(tmp_path / "tokenizer")
    write_shard(tmp_path / "ready", first.tokenizer.encode_documents(LINES), "uint16", {})  # type: ignore[arg-type]
    config = _config(tiny_toml, tmp_path / "ready", tmp_path / "cache", format="megatron")
    with pytest.raises(DataError, match=r"name the tokenizer.*data\.tokenizer\.path"):
        _build(config)
    overrides = [
        f"data.tokenizer={{path='{tmp_path / 'tokenizer'}'}}",
        f"data.sources=[{{name='s', path='{tmp_path / 'ready'}', format='megatron'}}]",
    ]
    config = load_config(tiny_toml, overrides)
    source = _build(config).sources[0]
    assert len(source.train) + len(source.held_out) == 40
    assert len(source.held_out) > 0
    write_shard(
        tmp_path / "ready",
        first.tokenizer.encode_documents(LINES),
        "uint16",  # type: ignore[arg-type]
        {"tokenizer_sha256": "0" * 64},
    )
    with pytest.raises(DataError, match="another tokenizer"):
        _build(config)


def test_vocabulary_mismatch_is_named(files: Path, tiny_toml: Path, tmp_path: Path) -> None:
    first = _build(_config(tiny_toml, files / "texts", tmp_path / "cache"))
    first.tokenizer.save(tmp_path / "tokenizer")
    overrides = [
        f"data.tokenizer={{path='{tmp_path / 'tokenizer'}'}}",
        f"data.sources=[{{name='s', path='{files / 'texts'}'}}]",
        "model.vocab_size=300",
    ]
    config = load_config(tiny_toml, overrides)
    with pytest.raises(DataError, match=r"tokenizer has \d+ entries but model\.vocab_size=300"):
        _build(config)


def test_a_damaged_cache_is_named(files: Path, tiny_toml: Path, tmp_path: Path) -> None:
    config = _config(tiny_toml, files / "texts", tmp_path / "cache")
    _build(config)
    shard = next((tmp_path / "cache/shards").rglob("train.bin"))
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(DataError, match=r"train\.bin is damaged.*delete the shard"):
        _build(config)


def test_bad_sources_are_named(files: Path, tiny_toml: Path, tmp_path: Path) -> None:
    def error(path: object, **changes: object) -> str:
        with pytest.raises(DataError) as caught:
            _build(_config(tiny_toml, path, tmp_path / "cache", **changes))
        return str(caught.value)

    assert "matches no file" in error(tmp_path / "absent.jsonl")
    assert "matches no file" in error(tmp_path / "*.nothing")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "broken\n')
    assert "bad.jsonl:2 is not valid JSON" in error(bad)
    message = error(files / "a.jsonl", text_key="content")
    assert "'content'" in message
    assert "set text_key" in message
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 3}\n')
    assert "record 1" in error(numbers)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert "latin.txt is not text in UTF-8" in error(latin)
    (tmp_path / "fake.parquet").write_bytes(b"not parquet at all")
    assert "fake.parquet" in error(tmp_path / "fake.parquet")
    (tmp_path / "data.xyz").write_text("what is this")
    assert "cannot tell the format" in error(tmp_path / "data.xyz")
    (tmp_path / "empty.txt").write_text("  \n")
    assert "has no training document" in error(tmp_path / "empty.txt")


def test_held_out_is_decided_by_the_hash_alone() -> None:
    chosen = [is_held_out(f"text {i}", 0.2) for i in range(5000)]
    assert sum(chosen) / 5000 == pytest.approx(0.2, abs=0.02)
    assert chosen == [is_held_out(f"text {i}", 0.2) for i in range(5000)]
    assert not any(is_held_out(f"text {i}", 0.0) for i in range(100))
