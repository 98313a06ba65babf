"""What a checkpoint directory must hold, byte for byte, checked before anything in it is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trinity.core.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = 1


def write_manifest(directory: Path) -> None:
    """Record size and SHA-256 of every file in ``directory``, and force all of it to disk."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    text = json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n"
    write_synced(directory / MANIFEST_FILE, text)
    sync_directory(directory)


def verify_manifest(directory: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first that differs.

    Links and files that the manifest does not name are refused too: nothing outside the directory
    is ever read, and nothing inside goes unchecked.
    """
    expected = _read_manifest(directory)
    present = {path.name for path in directory.iterdir()} - {MANIFEST_FILE}
    if missing := sorted(expected.keys() - present):
        raise CheckpointError(f"{directory}: file {missing[0]} is missing")
    if foreign := sorted(present - expected.keys()):
        raise CheckpointError(f"{directory}: file {foreign[0]} is not in {MANIFEST_FILE}")
    for name, entry in expected.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is not a plain file")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{path} has {size} bytes instead of {entry['size']}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, entry in files.items():
            if Path(name).name != name or not isinstance(entry["size"], int):
                raise CheckpointError(f"{path} names {name!r}, which is not a plain file name")
            entry["sha256"].encode()
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no {MANIFEST_FILE}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable manifest: {error!r}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}")
    return files


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
