"""The checkpoint store of a run: written so that a crash at any moment leaves a good one behind.

``RUN/checkpoints/step-00000100/`` holds torch.distributed.checkpoint's files with tensors and
nothing else, ``state.json`` with everything that is not a tensor, and ``manifest.json`` with size
and SHA-256 of each file. Order of a save: write all of it into ``tmp-*``, force it to disk, rename,
force the directory to disk, move ``latest``, and only then delete old checkpoints.

With an initialised process group of several ranks, :func:`save_checkpoint`,
:func:`load_checkpoint` and :func:`latest_checkpoint` are collective: every rank calls them, the
ranks share the writing and the hashing, and when one rank fails, all raise the same error.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trinity.ckpt.manifest import (
    describe_files,
    read_json,
    seal_of,
    sync_directory,
    verify_manifest,
    write_manifest,
    write_synced,
)
from trinity.ckpt.ranks import cause_of, gather, rank, reason_of, together, world_size
from trinity.ckpt.retention import expired_steps
from trinity.ckpt.safe_reader import SafeReader
from trinity.core.errors import CheckpointError

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"
LATEST_FILE = "latest"
STEP_PREFIX = "step-"
TEMPORARY_PREFIX = "tmp-"
REPLACED_PREFIX = "replaced-"
ANOTHER = "resume from another checkpoint"
COPY_AHEAD_BYTES = 10 << 20
"""Copied from the GPU while what came before is being written."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep_last: int,
    keep_every_steps: int = 0,
    group: dist.ProcessGroup | None = None,
    before_publish: Callable[[], None] | None = None,
) -> Path:
    """Write the checkpoint of ``step``, then delete the older ones that need not be kept.

    Args:
        tensors: plain ones, equal on every rank that has the name, or DTensors.
        meta: JSON; rank 0's is written.
        keep_last, keep_every_steps: see :func:`trinity.ckpt.retention.expired_steps`.
        group: all ranks of the job, in the order of the default group, which None stands for.
        before_publish: called on rank 0 when all is written, under its temporary name; a
            CheckpointError that it raises gives the save up.

    Raises CheckpointError when it cannot be written, for instance on a full disk; the temporary
    directory is gone then, and earlier checkpoints and ``latest`` are as they were.
    """
    assert keep_last >= 1
    state = json.dumps(dict(meta), indent=2) + "\n"
    root, final = run_dir / CHECKPOINTS_DIR, checkpoint_path(run_dir, step)
    own_rank = rank(group)
    failure, remedy = save_failure(run_dir, step)
    process_id = together(os.getpid, failure, remedy, group)[0]
    temporary = root / f"{TEMPORARY_PREFIX}{step:08d}-{process_id}"

    def prepare() -> None:
        if own_rank == 0:
            temporary.mkdir(parents=True, exist_ok=True)
            sync_directory(run_dir)

    def write() -> dict[str, dict[str, Any]]:
        _write_tensors(temporary, tensors, group)
        return describe_files(temporary.glob(f"__{own_rank}_*"))

    def publish() -> None:
        if own_rank == 0:
            write_synced(temporary / STATE_FILE, state)
            write_manifest(temporary, {name: e for files in written for name, e in files.items()})
            if before_publish is not None:
                before_publish()
            _publish(temporary, final)
            _remove_expired(run_dir, step, keep_last, keep_every_steps)

    try:
        together(prepare, failure, remedy, group)
        written = together(write, failure, remedy, group)
        together(publish, failure, remedy, group)
    finally:
        if own_rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (root / f"{LATEST_FILE}.tmp").unlink(missing_ok=True)
    return final


def save_failure(run_dir: Path, step: int) -> tuple[str, str]:
    """What to tell when a save fails, and the remedy."""
    root = run_dir / CHECKPOINTS_DIR
    return (
        f"could not save step {step} in {root}",
        "free space there, or mend its permissions, and resume. Earlier checkpoints are intact",
    )


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or will be."""
    return run_dir / CHECKPOINTS_DIR / f"{STEP_PREFIX}{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints, newest first, unverified."""
    found = (run_dir / CHECKPOINTS_DIR).glob(f"{STEP_PREFIX}*")
    return sorted((path for path in found if _step(path) >= 0), key=_step, reverse=True)


def clean_stale(run_dir: Path) -> None:
    """Remove what a save that died has left. Only for the one process that owns the run."""
    root = run_dir / CHECKPOINTS_DIR
    _restore_replaced(root)
    for path in root.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose every byte was compared with its manifest."""

    path: Path
    seal: frozenset[tuple[str, int, int, int]] | None
    """Name, size, time of change and inode of each file, taken before they were compared."""


def find_checkpoint(
    run_dir: Path, not_after: int | None = None
) -> tuple[VerifiedCheckpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was rejected.

    Newest of all, or of those of step ``not_after`` and before.
    """
    rejected: list[str] = []
    for path in gather(list_checkpoints(run_dir))[0]:
        if not_after is not None and _step(path) > not_after:
            continue
        try:
            return _verify(path), rejected
        except CheckpointError as error:
            rejected.append(f"checkpoint rejected: {error}")
    return None, rejected


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """As :func:`find_checkpoint`, for callers that only want to know where it is."""
    found, rejected = find_checkpoint(run_dir)
    return (found.path if found else None), rejected


def load_checkpoint(
    checkpoint: Path | VerifiedCheckpoint, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Fill ``tensors`` in place from a checkpoint and return its ``meta``.

    The manifest is verified before anything is parsed, unless :func:`find_checkpoint` has done so
    and no file changed since. The number of ranks may differ from the one that saved. Raises
    CheckpointError when a file is damaged or foreign, or when names, shapes or dtypes differ from
    ``tensors``.
    """
    path = _verified(checkpoint).path
    wanted = set().union(*gather(set(tensors)))  # pipeline stages hold different names

    def check() -> dict[str, Any]:
        stored = _stored(path)
        if missing := sorted(tensors.keys() - stored.keys()):
            raise CheckpointError(f"{path} lacks {_some(missing)}; was it saved by another model?")
        if unexpected := sorted(stored.keys() - wanted):
            raise CheckpointError(
                f"{path} also holds {_some(unexpected)}; was it saved by another model?"
            )
        for name, tensor in tensors.items():
            _check_like(path, name, stored[name], tensor)
        return read_json(path / STATE_FILE)

    meta = together(check, f"{path} cannot be read", ANOTHER)[rank()]
    _read(path, tensors, alone=world_size() == 1)
    return meta


def stored_names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint. The caller has verified the manifest."""
    return sorted(_stored(path))


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, whole, on the CPU. The caller has verified the manifest.

    Not collective: any rank may call it. Raises CheckpointError as :func:`load_checkpoint` does.
    """
    stored = _stored(path)
    wanted = list(names)
    if missing := sorted(set(wanted) - stored.keys()):
        raise CheckpointError(f"{path} lacks {_some(missing)}; was it saved by another model?")
    tensors = {
        name: torch.zeros(stored[name].size, dtype=stored[name].properties.dtype) for name in wanted
    }
    _read(path, tensors, alone=True)
    return tensors


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete directory its name, then move ``latest``."""
    root = final.parent
    try:
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(root / f"{REPLACED_PREFIX}{final.name}", ignore_errors=True)
            os.rename(final, root / f"{REPLACED_PREFIX}{final.name}")
        os.rename(temporary, final)
        sync_directory(root)
    finally:
        _restore_replaced(root)
    write_synced(root / f"{LATEST_FILE}.tmp", final.name + "\n")
    os.replace(root / f"{LATEST_FILE}.tmp", root / LATEST_FILE)
    sync_directory(root)


def _restore_replaced(root: Path) -> None:
    """Put back a checkpoint whose replacement did not arrive; drop it where it did."""
    for path in root.glob(f"{REPLACED_PREFIX}*"):
        original = root / path.name.removeprefix(REPLACED_PREFIX)
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, original)


def _remove(checkpoint: Path) -> None:
    """Rename first: a crash half way must not leave something that looks like a checkpoint."""
    condemned = checkpoint.with_name(f"{TEMPORARY_PREFIX}{checkpoint.name}")
    os.rename(checkpoint, condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def discard_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that went back has abandoned."""
    if rank() == 0:
        for path in list_checkpoints(run_dir):
            if _step(path) > step:
                _remove(path)
    gather(None)


def _step(checkpoint: Path) -> int:
    """The step a directory's name tells, or -1 for a name that save_checkpoint does not give."""
    match = re.fullmatch(rf"{STEP_PREFIX}(\d{{8,}})", checkpoint.name, re.ASCII)
    return int(match[1]) if match else -1


def _remove_expired(run_dir: Path, step: int, keep_last: int, keep_every_steps: int) -> None:
    of_step = {_step(path): path for path in list_checkpoints(run_dir)}
    for expired in expired_steps(
        of_step, step, keep_last=keep_last, keep_every_steps=keep_every_steps
    ):
        try:
            _remove(of_step[expired])
        except OSError as error:
            raise CheckpointError(
                f"step {step} is saved, but {of_step[expired]} could not be deleted: {error}; mend "
                "the permissions there and resume"
            ) from None


def _write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    alone = world_size(group) == 1
    if alone:
        _silence_notice()
    # Copying ahead is for tensors on a GPU. With copies on the host it would wait for the training
    # thread's kernels, on the GPU of another rank at that: a new thread is on GPU 0.
    on_host = all(tensor.is_cpu for tensor in tensors.values())
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0 if on_host else COPY_AHEAD_BYTES)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)


def _verified(checkpoint: Path | VerifiedCheckpoint) -> VerifiedCheckpoint:
    """Verify, unless that is done and no rank sees a file that changed since."""
    if isinstance(checkpoint, Path):
        return _verify(checkpoint)
    seal = seal_of(checkpoint.path)
    if all(gather(seal is not None and seal == checkpoint.seal)):
        return checkpoint
    return _verify(checkpoint.path)


def _verify(path: Path) -> VerifiedCheckpoint:
    seal = seal_of(path)
    share, num_shares = rank(), world_size()
    together(
        lambda: verify_manifest(path, share=share, num_shares=num_shares),
        f"{path} cannot be read",
        ANOTHER,
    )
    return VerifiedCheckpoint(path, seal)


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """What tensors a checkpoint holds. Their claimed sizes are backed by bytes on disk."""
    stored: dict[str, Any] = SafeReader(path).read_metadata().state_dict_metadata
    num_bytes = 0
    for name, entry in stored.items():
        if not _is_whole(entry):
            raise CheckpointError(
                f"{path}: the parts of {name} do not make up {tuple(entry.size)}; it is damaged or "
                "foreign, take another checkpoint"
            )
        num_elements = math.prod(entry.size)
        num_bytes += num_elements * entry.properties.dtype.itemsize
    available = sum(file.stat().st_size for file in path.glob("*.distcp"))
    if num_bytes > available:
        raise CheckpointError(
            f"{path}: its metadata describes {num_bytes} bytes of tensors, its files have "
            f"{available}; refused"
        )
    return stored


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the parts lie inside the tensor and have its volume together."""
    num_covered = 0
    for chunk in entry.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            return False
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
            if offset < 0 or size < 0 or offset + size > whole:
                return False
        num_covered += math.prod(chunk.sizes)
    return num_covered == math.prod(entry.size)


def _check_like(path: Path, name: str, stored: TensorStorageMetadata, tensor: Tensor) -> None:
    if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
        raise CheckpointError(
            f"{path}: {name} is {tuple(stored.size)} {stored.properties.dtype}, the model wants "
            f"{tuple(tensor.shape)} {tensor.dtype}; resume with the configuration it was saved with"
        )


def _read(path: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    if alone:
        _silence_notice()
    try:
        dcp.load(tensors, storage_reader=SafeReader(path), no_dist=alone)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(cause_of(error))}; {ANOTHER}"
        ) from None


def _silence_notice() -> None:
    """Silence torch's notice that it works in a single process, which is what we want here.

    Never taken back: ``warnings.catch_warnings`` in one thread spoils the filters of the others.
    """
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
