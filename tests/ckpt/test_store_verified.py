"""A checkpoint is hashed once on the way from disk into a run, and never less than once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trinity.ckpt import store
from trinity.ckpt.store import (
    VerifiedCheckpoint,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trinity.core.errors import CheckpointError


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), value)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 1, _tensors(1.0), {"step": 1}, keep_last=1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were hashed, in order."""
    found: list[Path] = []
    real = store.verify_manifest

    def verify(directory: Path, **options: Any) -> None:
        found.append(directory)
        real(directory, **options)

    monkeypatch.setattr(store, "verify_manifest", verify)
    return found


def test_what_was_found_is_not_hashed_again(
    saved: Path, tmp_path: Path, passes: list[Path]
) -> None:
    found, rejected = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, rejected) == (saved, [])
    loaded = _tensors(0.0)
    assert load_checkpoint(found, loaded) == {"step": 1}
    assert torch.equal(loaded["w"], torch.ones(100))
    assert passes == [saved]


def test_a_bare_path_is_always_hashed(saved: Path, tmp_path: Path, passes: list[Path]) -> None:
    assert latest_checkpoint(tmp_path) == (saved, [])
    load_checkpoint(saved, _tensors(0.0))
    load_checkpoint(saved, _tensors(0.0))
    assert passes == [saved] * 3


def _flip_in_place(path: Path) -> None:
    """Same size, same inode, and the old time of modification."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        (byte,) = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "SHA-256": lambda d: _flip_in_place(d / "__0_0.distcp"),
    "state.json is missing": lambda d: (d / "state.json").unlink(),
    "extra is not in": lambda d: (d / "extra").write_text("x"),
    "is not a checkpoint": lambda d: d.rename(d.with_name("moved")),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_changed_since_it_was_found_is_verified_anew(
    saved: Path, tmp_path: Path, message: str
) -> None:
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    CHANGES[message](saved)
    loaded = _tensors(0.0)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(found, loaded)
    assert not loaded["w"].any()


def test_a_seal_that_was_never_taken_counts_for_nothing(saved: Path, passes: list[Path]) -> None:
    load_checkpoint(VerifiedCheckpoint(saved, None), _tensors(0.0))
    assert passes == [saved]
    gone = saved.with_name("gone")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(VerifiedCheckpoint(gone, None), _tensors(0.0))
    assert passes == [saved, gone]
