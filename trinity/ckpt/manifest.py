"""What a checkpoint directory must hold, byte for byte, checked before anything in it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trinity.core.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
MAX_JSON_BYTES = 256 << 20
"""Far above any real one: the largest released model's index has 5 MB."""


def describe_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file by its name. Each is forced to disk too."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return files


def write_manifest(directory: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Record every file of ``directory`` and force all of it to disk.

    ``known`` holds what :func:`describe_files` found already, for instance on other ranks; only
    the remaining files are hashed here.
    """
    files = dict(known or {})
    files |= describe_files(path for path in directory.iterdir() if path.name not in files)
    text = json.dumps({"format": FORMAT, "files": files}, indent=2, sort_keys=True) + "\n"
    write_synced(directory / MANIFEST_FILE, text)
    sync_directory(directory)


def verify_manifest(directory: Path, *, share: int = 0, num_shares: int = 1) -> None:
    """Compare the files with the manifest. Raises CheckpointError naming the first that differs.

    Links and files that the manifest does not name are refused too: nothing outside the directory
    is ever read, and nothing inside goes unchecked.

    Args:
        share: which part of the hashing to do, of ``num_shares``: hashing is what costs, and the
            ranks of a job divide it. Names and sizes are always checked for all files.
    """
    expected = _read_manifest(directory)
    try:
        present = {path.name for path in directory.iterdir()} - {MANIFEST_FILE}
        if missing := sorted(expected.keys() - present):
            raise CheckpointError(f"{directory}: file {missing[0]} is missing")
        if foreign := sorted(present - expected.keys()):
            raise CheckpointError(f"{directory}: file {foreign[0]} is not in {MANIFEST_FILE}")
        for name, entry in expected.items():
            path = directory / name
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{path} is not a plain file")
            if (size := path.stat().st_size) != entry["size"]:
                raise CheckpointError(f"{path} has {size} bytes instead of {entry['size']}")
        for name in sorted(expected)[share::num_shares]:
            with (directory / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected[name]["sha256"]:
                raise CheckpointError(
                    f"{directory / name} is damaged: its SHA-256 is not the recorded one"
                )
    except OSError as error:  # a bad sector is damage like any other
        raise CheckpointError(f"{directory} cannot be read: {error}") from None


def seal_of(directory: Path) -> frozenset[tuple[str, int, int, int]] | None:
    """Name, size, time of change and inode of each file: equal seals, unchanged files.

    None when the directory cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    return frozenset((name, s.st_size, s.st_ctime_ns, s.st_ino) for name, s in found)


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST_FILE}")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} is not a readable manifest: it lists no files")
    for name, entry in files.items():
        if not is_plain_name(name):
            raise CheckpointError(f"{path} names {name!r}, which is not a plain file name")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path} is not a readable manifest: {name} lacks size or sha256")
    return files


def is_plain_name(name: object) -> bool:
    """Whether ``name`` can only mean a file directly inside the directory it is joined to."""
    return (
        isinstance(name, str)
        and name not in {"", ".", ".."}
        and name.isprintable()  # no NUL, no lone surrogates: the system would refuse them
        and not set(name) & {"/", "\\"}
    )


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that may be damaged or hostile.

    Raises CheckpointError when the file is missing, no plain file, larger than ``max_bytes``,
    nested beyond reason, or holds anything but an object.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        if not path.is_file():  # reading a pipe or a device would never end
            raise CheckpointError(f"{path} is not a plain file")
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes} bytes; refused")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def write_synced(path: Path, text: str) -> None:
    """Write a small text file and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to disk, so that a rename survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
