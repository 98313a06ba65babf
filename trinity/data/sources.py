"""Documents from local files: text, JSON lines, parquet, or this Python's own source code."""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from trinity.core.config import SourceConfig
from trinity.core.errors import DataError

STDLIB = "stdlib"
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".idx": "megatron",
}
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted by name. Raises DataError when there are none."""
    if source.path == STDLIB:
        return _stdlib_files()
    path = Path(source.path)
    if path.is_dir():
        wanted = (
            set(FORMATS)
            if source.format == "auto"
            else {suffix for suffix, kind in FORMATS.items() if kind == source.format}
        )
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in wanted)
    elif source.format == "megatron" and path.with_name(path.name + ".idx").is_file():
        files = [path.with_name(path.name + ".idx")]
    else:
        files = sorted(Path(name) for name in glob.glob(source.path, recursive=True))
    if not files:
        raise DataError(
            f"data source {source.name!r}: path={source.path!r} matches no file; give a file, a "
            f'directory, a glob, or "{STDLIB}"'
        )
    return files


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def format_of(source: SourceConfig, file: Path) -> str:
    """How ``file`` is read. Raises DataError when neither configuration nor suffix tells."""
    if source.path == STDLIB:
        return "text"
    if source.format != "auto":
        return source.format
    if file.suffix not in FORMATS:
        raise DataError(
            f"data source {source.name!r}: cannot tell the format of {file}; set its `format` to "
            "text, jsonl, parquet or megatron"
        )
    return FORMATS[file.suffix]


def content_sha256(files: list[Path]) -> str:
    """Hash of the contents of ``files`` in order; names do not count."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def documents(source: SourceConfig, files: list[Path]) -> Iterator[str]:
    """Every document's text, in the order of the files; empty ones are left out."""
    for file in files:
        kind = format_of(source, file)
        if kind == "text":
            texts = iter([_read_text(source, file)])
        elif kind in ("jsonl", "parquet"):
            texts = _rows(source, file, kind)
        else:
            raise DataError(f"data source {source.name!r}: {file} holds tokens, not text")
        yield from (text for text in texts if text.strip())


def _read_text(source: SourceConfig, file: Path) -> str:
    try:
        if file.suffix == ".py":
            with tokenize.open(file) as handle:  # honours the encoding the file declares
                return handle.read()
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(
            f"data source {source.name!r}: {file} is not text in UTF-8 or its declared encoding: "
            f"{error}; convert or remove it"
        ) from None


def _rows(source: SourceConfig, file: Path, kind: str) -> Iterator[str]:
    """The text column of a JSONL or parquet file, streamed through Hugging Face datasets."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    builder = "json" if kind == "jsonl" else "parquet"
    try:
        stream = datasets.load_dataset(
            builder, data_files=[str(file)], split="train", streaming=True
        )
        for number, row in enumerate(stream, start=1):
            text = row.get(source.text_key)
            if not isinstance(text, str):
                raise DataError(
                    f"data source {source.name!r}: {file}, record {number}: key "
                    f"{source.text_key!r} holds {text!r:.40}, not text; its keys are "
                    f"{sorted(row)}; set text_key"
                )
            yield text
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise DataError(
            f"data source {source.name!r}: {_where(file, kind)}: {error}; mend or remove it"
        ) from None


def _where(file: Path, kind: str) -> str:
    """``file:line`` of the first line that is no JSON object, else the file."""
    if kind != "jsonl":
        return f"{file} is not readable parquet"
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                try:
                    json.loads(line)
                except ValueError:
                    return f"{file}:{number} is not valid JSON"
    return str(file)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out set: decided by its hash alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64
