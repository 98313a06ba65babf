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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trinity.ckpt.manifest import (
    describe_files,
    read_json,
    sync_directory,
    verify_manifest,
    write_manifest,
    write_synced,
)
from trinity.ckpt.safe_reader import SafeReader
from trinity.core.errors import CheckpointError

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"
LATEST_FILE = "latest"
STEP_PREFIX = "step-"
TEMPORARY_PREFIX = "tmp-"
REPLACED_PREFIX = "replaced-"
ANOTHER = "resume from another checkpoint"

T = TypeVar("T")


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the newest ``keep_last`` up to it.

    Args:
        tensors: plain ones, equal on every rank that has the name, or DTensors.
        meta: JSON; rank 0's is written.
        keep_last: at least 1. Checkpoints of later steps, which a resume passed over as damaged,
            are left alone until training gets there.

    Raises CheckpointError when it cannot be written, for instance on a full disk; the temporary
    directory is gone then, and earlier checkpoints and ``latest`` are as they were.
    """
    assert keep_last >= 1
    state = json.dumps(dict(meta), indent=2) + "\n"
    root = run_dir / CHECKPOINTS_DIR
    final = root / f"{STEP_PREFIX}{step:08d}"
    rank = _rank()
    process_id = _gather(os.getpid())[0]
    temporary = root / f"{TEMPORARY_PREFIX}{step:08d}-{process_id}"

    def prepare() -> None:
        if rank == 0:
            temporary.mkdir(parents=True, exist_ok=True)
            sync_directory(run_dir)

    def write() -> dict[str, dict[str, Any]]:
        with _quiet():
            dcp.save(dict(tensors), checkpoint_id=temporary, no_dist=_world_size() == 1)
        return describe_files(temporary.glob(f"__{rank}_*"))

    def publish() -> None:
        if rank == 0:
            write_synced(temporary / STATE_FILE, state)
            write_manifest(temporary, {name: e for files in written for name, e in files.items()})
            _publish(temporary, final)

    failure = f"could not save step {step} in {root}"
    remedy = "free space there, or mend its permissions, and resume. Earlier checkpoints are intact"
    try:
        _together(prepare, failure, remedy)
        written = _together(write, failure, remedy)
        _together(publish, failure, remedy)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (root / f"{LATEST_FILE}.tmp").unlink(missing_ok=True)
    if rank == 0:
        for old in [p for p in list_checkpoints(run_dir) if _step(p) < step][keep_last - 1 :]:
            _remove(old)
    return final


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


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was rejected."""
    rejected: list[str] = []
    for path in _gather(list_checkpoints(run_dir))[0]:
        try:
            _verify(path)
        except CheckpointError as error:
            rejected.append(f"checkpoint rejected: {error}")
            continue
        return path, rejected
    return None, rejected


def load_checkpoint(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` in place from a checkpoint and return its ``meta``.

    The manifest is verified before anything is parsed. The number of ranks may differ from the
    one that saved. Raises CheckpointError when a file is damaged or foreign, or when names, shapes
    or dtypes differ from ``tensors``.
    """
    _verify(path)
    wanted = set().union(*_gather(set(tensors)))  # pipeline stages hold different names

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

    meta = _together(check, f"{path} cannot be read", ANOTHER)[_rank()]
    _read(path, tensors, alone=_world_size() == 1)
    return meta


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


def _step(checkpoint: Path) -> int:
    """The step a directory's name tells, or -1 for a name that save_checkpoint does not give."""
    match = re.fullmatch(rf"{STEP_PREFIX}(\d{{8,}})", checkpoint.name, re.ASCII)
    return int(match[1]) if match else -1


def _verify(path: Path) -> None:
    share, num_shares = _rank(), _world_size()
    _together(
        lambda: verify_manifest(path, share=share, num_shares=num_shares),
        f"{path} cannot be read",
        ANOTHER,
    )


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
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=SafeReader(path), no_dist=alone)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"{path} cannot be read: {_reason(_cause(error))}; {ANOTHER}"
        ) from None


def _together(work: Callable[[], T], failure: str, remedy: str) -> list[T]:
    """Do ``work`` on every rank and return all results; where one failed, every rank raises.

    Without this the ranks that did well would wait forever for the one that did not.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as error:
        problem = str(error)
    # A full disk shows as OSError, as torch's "unexpected pos" RuntimeError, or wrapped by DCP.
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        if not isinstance(cause, Exception):  # Ctrl-C, which DCP wraps too
            raise cause from None
        problem = f"{failure}: {_reason(cause)}; {remedy}"
    outcomes = _gather((result, problem))
    for _, reported in outcomes:
        if reported is not None:
            raise CheckpointError(reported)
    return [cast(T, outcome) for outcome, _ in outcomes]


def _cause(error: BaseException) -> BaseException:
    """DCP wraps one exception for each rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(error).strip()
    if "unexpected pos" in text or "PytorchStreamWriter" in text:  # torch's words for a short write
        return "a file could not be written in full, as on a full disk"
    return text.splitlines()[0] if text else type(error).__name__


def _gather(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's notice that it works in a single process, which is what we want here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
