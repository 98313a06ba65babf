"""The checkpoint store of a run: written so that a crash at any moment leaves a good one behind.

``RUN/checkpoints/step-00000100/`` holds torch.distributed.checkpoint's files with tensors and
nothing else, ``state.json`` with everything that is not a tensor, and ``manifest.json`` with size
and SHA-256 of each file. Order of a save: write all of it into ``tmp-*``, force it to disk, rename,
force the directory to disk, move ``latest``, and only then delete old checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trinity.ckpt.manifest import sync_directory, verify_manifest, write_manifest, write_synced
from trinity.ckpt.safe_reader import SafeReader
from trinity.core.errors import CheckpointError

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"
LATEST_FILE = "latest"
STEP_PREFIX = "step-"
TEMPORARY_PREFIX = "tmp-"


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the newest ``keep_last``.

    ``meta`` must be JSON. Raises CheckpointError when it cannot be written, for instance on a full
    disk; the temporary directory is gone then, and earlier checkpoints and ``latest`` are as they
    were.
    """
    root = run_dir / CHECKPOINTS_DIR
    final = root / f"{STEP_PREFIX}{step:08d}"
    temporary = root / f"{TEMPORARY_PREFIX}{step:08d}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # torch announces that it saves from a single process, which is what we want here.
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.save(dict(tensors), checkpoint_id=temporary, no_dist=True)
        write_synced(temporary / STATE_FILE, json.dumps(dict(meta), indent=2) + "\n")
        write_manifest(temporary)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(root)
        write_synced(root / f"{LATEST_FILE}.tmp", final.name + "\n")
        os.replace(root / f"{LATEST_FILE}.tmp", root / LATEST_FILE)
        sync_directory(root)
    # A full disk shows as OSError, as torch's "unexpected pos" RuntimeError, or wrapped by DCP.
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"could not save step {step} in {root}: {reason}; free space there and resume. "
            "Earlier checkpoints are intact"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(run_dir)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints, newest first, unverified."""
    return sorted((run_dir / CHECKPOINTS_DIR).glob(f"{STEP_PREFIX}*"), reverse=True)


def clean_stale(run_dir: Path) -> None:
    """Remove what a save that died has left. Only for the process that owns the run."""
    for path in (run_dir / CHECKPOINTS_DIR).glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was rejected."""
    rejected: list[str] = []
    for path in list_checkpoints(run_dir):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            rejected.append(f"checkpoint rejected: {error}")
            continue
        return path, rejected
    return None, rejected


def load_checkpoint(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` in place from a checkpoint and return its ``meta``.

    The manifest is verified before anything is parsed. Raises CheckpointError when a file is
    damaged or foreign, or when names, shapes or dtypes differ from ``tensors``.
    """
    verify_manifest(path)
    stored = _stored(path)
    if missing := sorted(tensors.keys() - stored.keys()):
        raise CheckpointError(f"{path} lacks {_some(missing)}; was it saved by another model?")
    if unexpected := sorted(stored.keys() - tensors.keys()):
        raise CheckpointError(f"{path} also holds {_some(unexpected)}; was it another model's?")
    for name, tensor in tensors.items():
        _check_like(path, name, stored[name], tensor)
    _read(path, tensors)
    return _read_meta(path)


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, on the CPU. The caller has verified the manifest."""
    stored = _stored(path)
    wanted = list(names)
    if missing := sorted(set(wanted) - stored.keys()):
        raise CheckpointError(f"{path} lacks {_some(missing)}; was it saved by another model?")
    tensors = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in wanted
    }
    _read(path, tensors)
    return tensors


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    return SafeReader(path).read_metadata().state_dict_metadata  # type: ignore[return-value]


def _check_like(path: Path, name: str, stored: TensorStorageMetadata, tensor: Tensor) -> None:
    if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
        raise CheckpointError(
            f"{path}: {name} is {tuple(stored.size)} {stored.properties.dtype}, the model wants "
            f"{tuple(tensor.shape)} {tensor.dtype}; resume with the configuration it was saved with"
        )


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_FILE} is not readable: {error}") from None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
