"""Saving beside the training with several ranks: no mixed-up collectives, errors in step."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes as start

from trinity.ckpt import background, store
from trinity.ckpt.background import BackgroundSaver
from trinity.ckpt.staging import HostStaging
from trinity.ckpt.store import (
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from trinity.core.errors import CheckpointError

WORLD_SIZE = 2
ROWS = 7  # odd: the ranks' parts differ in size
NUM_SAVES = 4


def _whole(scale: float = 1.0) -> Tensor:
    return (torch.arange(ROWS * 300.0).reshape(ROWS, 300) + 1) * scale


def _tensors(scale: float = 1.0) -> dict[str, Tensor]:
    """Sharded by either dimension, replicated, plain, and one that only the last rank has."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    tensors: dict[str, Tensor] = {
        "rows": distribute_tensor(_whole(scale), mesh, [Shard(0)]),
        "columns": distribute_tensor(_whole(scale), mesh, [Shard(1)]),
        "lonely": distribute_tensor(torch.ones(1, 3) * scale, mesh, [Shard(0)]),
        "replicated": distribute_tensor(torch.ones(5) * scale, mesh, [Replicate()]),
        "plain": torch.arange(4) * int(scale),
    }
    if dist.get_rank() == WORLD_SIZE - 1:
        tensors["last_stage"] = torch.full((3,), 2.0 * scale)
    return tensors


def _enter(rank: int, work: Callable[[Path], None], run_dir: Path) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(run_dir / f"store-{work.__name__}"), WORLD_SIZE)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=WORLD_SIZE)
    try:
        work(run_dir)
    finally:
        dist.destroy_process_group()


def _on_ranks(work: Callable[[Path], None], run_dir: Path) -> None:
    """Forked, not spawned: torch is imported already."""
    context = start(_enter, (work, run_dir), nprocs=WORLD_SIZE, join=False, start_method="fork")
    assert context is not None
    for _ in range(WORLD_SIZE):
        if context.join(timeout=60):
            return
    for process in context.processes:
        process.kill()
    pytest.fail("a rank did not end within 60 s")


def _train_step(step: int) -> None:
    """A collective of the training thread, with a result that tells if it met a foreign one."""
    value = torch.full((1000,), float(step))
    dist.all_reduce(value)
    assert value.unique().tolist() == [float(step * WORLD_SIZE)]


def _train_and_save(run_dir: Path) -> None:
    step, num_steps_beside = 0, 0
    with BackgroundSaver() as saver:
        for scale in range(1, NUM_SAVES + 1):
            tensors = _tensors(scale)
            saver.save(run_dir, scale, tensors, {"scale": scale}, keep_last=9)
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            saved = []
            while not saved:
                step += 1
                _train_step(step)
                saved = saver.poll()
                num_steps_beside += not saved
            assert [s.path for s in saved] == [checkpoint_path(run_dir, scale)]
    assert num_steps_beside > 0
    _train_step(step)


def test_training_talks_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    _on_ranks(_train_and_save, tmp_path)
    paths = list_checkpoints(tmp_path)
    assert len(paths) == NUM_SAVES
    names = ["rows", "columns", "lonely", "replicated", "plain", "last_stage"]
    for path in paths:
        scale = int(path.name[-1])
        loaded = {name: torch.zeros_like(t) for name, t in load_tensors(path, names).items()}
        assert load_checkpoint(path, loaded) == {"scale": scale}
        assert torch.equal(loaded["rows"], _whole(scale))
        assert torch.equal(loaded["columns"], _whole(scale))
        assert torch.equal(loaded["lonely"], torch.ones(1, 3) * scale)
        assert torch.equal(loaded["replicated"], torch.ones(5) * scale)
        assert torch.equal(loaded["plain"], torch.arange(4) * scale)
        assert torch.equal(loaded["last_stage"], torch.full((3,), 2.0 * scale))


def _save_both_ways(run_dir: Path) -> None:
    save_checkpoint(run_dir / "foreground", 1, _tensors(), {}, keep_last=1)
    with BackgroundSaver() as saver:
        saver.save(run_dir / "background", 1, _tensors(), {}, keep_last=1)


def test_files_of_all_ranks_are_those_of_a_save_in_the_foreground(tmp_path: Path) -> None:
    _on_ranks(_save_both_ways, tmp_path)
    foreground = checkpoint_path(tmp_path / "foreground", 1)
    files = sorted(foreground.glob("*.distcp"))
    assert len(files) == WORLD_SIZE
    for file in files:
        other = checkpoint_path(tmp_path / "background", 1) / file.name
        assert file.read_bytes() == other.read_bytes(), file.name


def _train_until_raised(saver: BackgroundSaver, steps: list[int]) -> None:
    while True:
        steps.append(len(steps) + 1)
        _train_step(steps[-1])
        saver.poll()


def _fail_on_rank_1(run_dir: Path) -> None:
    rank = dist.get_rank()

    def save_and_linger(*args: Any, **options: Any) -> Path:
        """Rank 1 hears of the failure later than rank 0 does."""
        try:
            return save_checkpoint(*args, **options)
        finally:
            time.sleep(0.5 * rank)

    background.save_checkpoint = save_and_linger
    with BackgroundSaver() as saver:
        saver.save(run_dir, 1, _tensors(1.0), {}, keep_last=1)
        saver.wait()
        if rank == 1:  # a file-size limit stands in for a disk that is full on one node only
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        saver.save(run_dir, 2, _tensors(2.0), {}, keep_last=1)
        steps: list[int] = []
        with pytest.raises(CheckpointError, match="could not save step 2"):
            _train_until_raised(saver, steps)
        # The ranks' store is a file, too, and is written to when the groups end.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    last_steps: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(last_steps, steps[-1])
    assert last_steps[0] == last_steps[1]


def test_a_failure_of_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    _on_ranks(_fail_on_rank_1, tmp_path)
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1), [])
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


def _lose_rank_1(run_dir: Path) -> None:
    saver = BackgroundSaver()
    saver.save(run_dir, 1, _tensors(1.0), {}, keep_last=1)
    saver.wait()
    if dist.get_rank() == 1:
        store.describe_files = lambda _: os._exit(0)  # 0: else the other rank is ended as well
    saver.save(run_dir, 2, _tensors(2.0), {}, keep_last=1)
    with pytest.raises(CheckpointError, match=r"could not save step 2.* lost touch with another"):
        saver.wait()
    (run_dir / "told").touch()


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    _on_ranks(_lose_rank_1, tmp_path)
    assert (tmp_path / "told").exists()
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1), [])
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


def _lack_memory_on_rank_1(run_dir: Path) -> None:
    real_fill = HostStaging.fill

    def fill(staging: HostStaging, tensors: Any) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        real_fill(staging, tensors)

    with BackgroundSaver() as saver:
        HostStaging.fill = fill
        with pytest.raises(CheckpointError, match=r"allocate memory; .*checkpoint\.asynchronous"):
            saver.save(run_dir, 1, _tensors(), {}, keep_last=1)
        HostStaging.fill = real_fill
        saver.save(run_dir, 2, _tensors(), {}, keep_last=1)
        assert saver.wait() == checkpoint_path(run_dir, 2)


def test_too_little_memory_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    _on_ranks(_lack_memory_on_rank_1, tmp_path)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 2)]
