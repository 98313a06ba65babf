"""The store under a process group: ranks share the work, and a failure of one is one of all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import ProcessException
from torch.multiprocessing.spawn import start_processes as start

from trinity.ckpt import store
from trinity.ckpt.store import (
    VerifiedCheckpoint,
    clean_stale,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from trinity.core.errors import CheckpointError

ROWS = 7  # odd: the ranks' parts differ in size


def _whole() -> torch.Tensor:
    return torch.arange(ROWS * 3.0).reshape(ROWS, 3) + 1


def _tensors(rank: int, world_size: int, *, dim: int = 0, scale: float = 1) -> dict[str, object]:
    """A sharded, a replicated and a plain tensor, and one that only the last rank has."""
    mesh = init_device_mesh("cpu", (world_size,))
    tensors: dict[str, object] = {
        "sharded": distribute_tensor(_whole() * scale, mesh, [Shard(dim)]),
        "replicated": distribute_tensor(torch.ones(5) * scale, mesh, [Replicate()]),
        "plain": torch.arange(4) * int(scale),
    }
    if rank == world_size - 1:
        tensors["last_stage"] = torch.full((3,), 2.0 * scale)
    return tensors


def _enter(rank: int, world_size: int, work: Callable[..., None], run_dir: Path) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(run_dir / f"store-{work.__name__}-{world_size}"), world_size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world_size)
    try:
        work(rank, world_size, run_dir)
    finally:
        dist.destroy_process_group()


def _on_ranks(world_size: int, work: Callable[..., None], run_dir: Path) -> None:
    """Forked, not spawned: torch is imported already."""
    context = start(
        _enter, (world_size, work, run_dir), nprocs=world_size, join=False, start_method="fork"
    )
    assert context is not None
    for _ in range(world_size):
        if context.join(timeout=60):
            return
    pytest.fail("a rank did not end within 60 s")


def _save(rank: int, world_size: int, run_dir: Path) -> None:
    tensors = _tensors(rank, world_size)
    save_checkpoint(run_dir, 1, tensors, {"step": 1, "rank": rank}, keep_last=2)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with step 1, saved by two ranks."""
    run_dir = tmp_path_factory.mktemp("ranks")
    _on_ranks(2, _save, run_dir)
    return run_dir


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(saved_once / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def _load(rank: int, world_size: int, run_dir: Path) -> None:
    path, rejected = latest_checkpoint(run_dir)
    assert path is not None
    assert rejected == []
    tensors = _tensors(rank, world_size, dim=1, scale=0)
    assert load_checkpoint(path, tensors) == {"step": 1, "rank": 0}  # type: ignore[arg-type]
    sharded = tensors["sharded"]
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.full_tensor(), _whole())
    assert torch.equal(tensors["plain"], torch.arange(4))  # type: ignore[arg-type]
    if rank == world_size - 1:
        assert torch.equal(tensors["last_stage"], torch.full((3,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [2, 3])
def test_saved_by_many_ranks_loaded_by_others_and_by_one(tmp_path: Path, world_size: int) -> None:
    _on_ranks(world_size, _save, tmp_path)
    _on_ranks(5 - world_size, _load, tmp_path)
    path, _ = latest_checkpoint(tmp_path)
    assert path is not None
    assert len(list(path.glob("*.distcp"))) == world_size
    names = ["sharded", "replicated", "plain", "last_stage"]
    alone = {name: torch.zeros_like(t) for name, t in load_tensors(path, names).items()}
    load_checkpoint(path, alone)
    assert torch.equal(alone["sharded"], _whole())
    assert torch.equal(alone["replicated"], torch.ones(5))
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


def _fail_on_rank_1(rank: int, world_size: int, run_dir: Path) -> None:
    tensors = _tensors(rank, world_size)
    dist.barrier()  # the ranks' store is a file, too: let all be written before the limit
    if rank == 1:  # a file-size limit stands in for a disk that is full on one node only
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="could not save step 2"):
        save_checkpoint(run_dir, 2, tensors, {}, keep_last=1)  # type: ignore[arg-type]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk_on_one_rank_is_an_error_on_all(saved: Path) -> None:
    _on_ranks(2, _fail_on_rank_1, saved)
    assert [path.name for path in list_checkpoints(saved)] == ["step-00000001"]
    assert (saved / "checkpoints/latest").read_text() == "step-00000001\n"
    assert not list((saved / "checkpoints").glob("tmp-*"))
    _on_ranks(3, _load, saved)


def _reject(rank: int, world_size: int, run_dir: Path) -> None:
    (path,) = list_checkpoints(run_dir)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(path, _tensors(rank, world_size))  # type: ignore[arg-type]
    found, rejected = latest_checkpoint(run_dir)
    assert found is None
    assert "SHA-256" in rejected[0]


@pytest.mark.parametrize("file", ["__1_0.distcp", "state.json"])
def test_damage_that_one_rank_finds_is_an_error_on_all(saved: Path, file: str) -> None:
    (path,) = list_checkpoints(saved)
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)
    _on_ranks(2, _reject, saved)


def _load_what_one_rank_sees_changed(rank: int, world_size: int, run_dir: Path) -> None:
    passes: list[Path] = []
    real = store.verify_manifest

    def verify(directory: Path, **options: int) -> None:
        passes.append(directory)
        real(directory, **options)

    store.verify_manifest = verify
    found, _ = find_checkpoint(run_dir)
    assert found is not None
    tensors = _tensors(rank, world_size, scale=0)
    load_checkpoint(found, tensors)  # type: ignore[arg-type]
    assert passes == [found.path]
    seen = VerifiedCheckpoint(found.path, None) if rank == 1 else found
    load_checkpoint(seen, tensors)  # type: ignore[arg-type]
    assert passes == [found.path] * 2


def test_a_change_that_one_rank_sees_makes_all_verify_anew(saved: Path) -> None:
    _on_ranks(2, _load_what_one_rank_sees_changed, saved)


def _want_more(rank: int, world_size: int, run_dir: Path) -> None:
    (path,) = list_checkpoints(run_dir)
    tensors = _tensors(rank, world_size)
    if rank == 0:
        tensors["more"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="lacks more"):
        load_checkpoint(path, tensors)  # type: ignore[arg-type]
    if rank == 0:
        del tensors["more"]
    tensors.pop("last_stage", None)
    with pytest.raises(CheckpointError, match="also holds last_stage"):
        load_checkpoint(path, tensors)  # type: ignore[arg-type]


def test_names_that_one_rank_misses_are_an_error_on_all(saved: Path) -> None:
    _on_ranks(2, _want_more, saved)


def _die_before_publishing(rank: int, world_size: int, run_dir: Path) -> None:
    if rank == 0:
        real = os.rename

        def rename(source: Path, target: Path) -> None:
            if target.name == "step-00000002":
                os._exit(9)
            real(source, target)

        os.rename = rename  # type: ignore[assignment]
    tensors = _tensors(rank, world_size)
    save_checkpoint(run_dir, 2, tensors, {}, keep_last=1)  # type: ignore[arg-type]


def test_a_rank_killed_before_the_rename_leaves_the_previous_checkpoint(saved: Path) -> None:
    with pytest.raises(ProcessException):
        _on_ranks(2, _die_before_publishing, saved)
    assert list((saved / "checkpoints").glob("tmp-*"))
    clean_stale(saved)
    assert not list((saved / "checkpoints").glob("tmp-*"))
    assert [path.name for path in list_checkpoints(saved)] == ["step-00000001"]
    _on_ranks(2, _load, saved)
