"""Saving beside the training: what is saved, when errors show, and what a crash leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import ProcessExitedException
from torch.multiprocessing.spawn import start_processes as start

from trinity.ckpt import background, store
from trinity.ckpt.background import BackgroundSaver
from trinity.ckpt.staging import HostStaging
from trinity.ckpt.store import (
    checkpoint_path,
    clean_stale,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from trinity.core.errors import CheckpointError, DataError

NUM_ELEMENTS = 50_000
LIMIT_BYTES = 100_000
"""Of a file, in place of a full disk: half of what NUM_ELEMENTS need."""


def _tensors(value: float = 1.0, num_elements: int = NUM_ELEMENTS) -> dict[str, torch.Tensor]:
    return {"w": torch.full((num_elements,), value), "step": torch.tensor(value)}


def _stored_value(path: Path) -> float:
    """The one value that all elements of a checkpoint have."""
    loaded = _tensors(0.0)
    load_checkpoint(path, loaded)
    assert torch.equal(loaded["w"], loaded["step"].expand(NUM_ELEMENTS))
    return loaded["step"].item()


def _in_fork(work: Callable[[Path], None], run_dir: Path) -> None:
    """Run ``work`` in a process of its own, whose limits and death are its own too."""
    context = start(_enter, (work, run_dir), nprocs=1, join=False, start_method="fork")
    assert context is not None
    if not context.join(timeout=60):
        pytest.fail("the process did not end within 60 s")


def _enter(_: int, work: Callable[[Path], None], run_dir: Path) -> None:
    torch.set_num_threads(1)
    work(run_dir)


@pytest.fixture
def saver() -> Iterator[BackgroundSaver]:
    with BackgroundSaver() as saver:
        yield saver


class _Gate:
    """Holds each write back until opened, and notes what happens when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.events: list[str] = []
        real_save, real_fill = save_checkpoint, HostStaging.fill

        def save(run_dir: Path, step: int, *args: Any, **options: Any) -> Path:
            self.events.append(f"write {step}")
            assert self.opened.wait(timeout=60)
            path = real_save(run_dir, step, *args, **options)
            self.events.append(f"written {step}")
            return path

        def fill(staging: HostStaging, tensors: Any) -> None:
            self.events.append("copy")
            real_fill(staging, tensors)

        monkeypatch.setattr(background, "save_checkpoint", save)
        monkeypatch.setattr(HostStaging, "fill", fill)


def test_saved_is_what_was_there_at_the_call(
    saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(monkeypatch)
    tensors, meta = _tensors(1.0), {"step": 1, "more": [1]}
    saver.save(tmp_path, 1, tensors, meta, keep_last=2)
    for tensor in tensors.values():
        tensor.zero_()
    meta["more"].append(2)  # type: ignore[attr-defined]
    tensors.clear()
    assert saver.poll() == []
    assert list_checkpoints(tmp_path) == []
    gate.opened.set()
    path = saver.wait()
    assert path == checkpoint_path(tmp_path, 1)
    assert _stored_value(path) == 1.0
    assert json.loads((path / store.STATE_FILE).read_text()) == {"step": 1, "more": [1]}


def test_files_are_those_of_a_save_in_the_foreground(
    saver: BackgroundSaver, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "parameter": torch.nn.Parameter(torch.randn(33, 17, generator=generator)),
        "transposed": torch.randn(5, 7, generator=generator).mT,
        "row of a table": torch.randn(4, 9, generator=generator)[2],
        "bf16": torch.randn(11, generator=generator).bfloat16(),
        "odd values": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "rng": torch.get_rng_state(),
        "rows": torch.arange(7),
    }
    foreground = save_checkpoint(tmp_path / "foreground", 4, tensors, {"a": 1}, keep_last=1)
    for _ in range(2):  # the second one into the buffers of the first
        saver.save(tmp_path / "background", 4, tensors, {"a": 1}, keep_last=1)
    path = saver.wait()
    assert path is not None
    names = sorted(file.name for file in foreground.iterdir())
    assert sorted(file.name for file in path.iterdir()) == names
    for name in names:
        if name not in {".metadata", "manifest.json"}:  # these two hold an identifier of the save
            assert (path / name).read_bytes() == (foreground / name).read_bytes(), name
    loaded = [{n: torch.zeros_like(t) for n, t in tensors.items()} for _ in range(2)]
    load_checkpoint(path, loaded[0])
    load_checkpoint(foreground, loaded[1])
    for name, tensor in loaded[0].items():  # as bytes: NaN is not equal to itself
        bits = [
            t.detach().contiguous().view(-1).view(torch.uint8) for t in (tensor, loaded[1][name])
        ]
        assert torch.equal(*bits), name


def test_only_one_save_is_in_flight(
    saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(monkeypatch)
    saver.save(tmp_path, 1, _tensors(1.0), {}, keep_last=3)
    opener = threading.Timer(0.3, gate.opened.set)  # while the second call waits
    opener.start()
    saver.save(tmp_path, 2, _tensors(2.0), {}, keep_last=3)
    assert gate.events[:4] == ["copy", "write 1", "written 1", "copy"]
    saver.wait()
    opener.join()
    assert [_stored_value(path) for path in list_checkpoints(tmp_path)] == [2.0, 1.0]
    assert [saved.step for saved in saver.poll()] == [1, 2]


def test_each_published_checkpoint_is_reported_once_with_what_it_cost(
    saver: BackgroundSaver, tmp_path: Path
) -> None:
    assert saver.wait() is None
    assert saver.poll() == []
    saver.save(tmp_path, 3, _tensors(), {}, keep_last=1)
    path = saver.wait()
    (saved,) = saver.poll()
    assert (saved.step, saved.path) == (3, path)
    assert saved.times.num_bytes == 4 * NUM_ELEMENTS + 4
    assert min(saved.times) >= 0
    assert saved.times.written_s > 0
    assert saver.poll() == []
    assert saver.wait() == path


def test_buffers_are_allocated_once() -> None:
    staging = HostStaging()
    staging.fill({"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)})
    before = {name: tensor.data_ptr() for name, tensor in staging.tensors.items()}
    kept = dict(staging.tensors)  # so that their memory is not used anew
    staging.fill({"a": torch.full((3,), 2.0), "b": torch.zeros(4), "c": torch.zeros(3).double()})
    assert staging.tensors["a"].data_ptr() == before["a"]
    assert torch.equal(kept["a"], torch.full((3,), 2.0))
    assert staging.tensors["b"].shape == (4,)
    assert staging.tensors["c"].dtype == torch.float64
    assert staging.num_bytes == 12 + 16 + 24
    staging.fill({"a": torch.ones(3)})
    assert list(staging.tensors) == ["a"]
    assert staging.num_bytes == 12


def test_steps_to_keep_for_good(saver: BackgroundSaver, tmp_path: Path) -> None:
    for step in range(1, 8):
        saver.save(tmp_path, step, _tensors(step), {}, keep_last=2, keep_every_steps=3)
    saver.wait()
    assert [p.name[-2:] for p in list_checkpoints(tmp_path)] == ["07", "06", "03"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_the_new_one_is_there(
    saver: BackgroundSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    saver.save(tmp_path, 1, _tensors(1.0), {}, keep_last=1)
    saver.wait()
    monkeypatch.setattr(store, "_remove", refuse)
    saver.save(tmp_path, 2, _tensors(2.0), {}, keep_last=1)
    with pytest.raises(CheckpointError, match=r"step 2 is saved, but .*step-00000001 could not be"):
        saver.wait()
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 2), [])


def _limit_file_size(num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _poll_until_raised(saver: BackgroundSaver) -> None:
    while True:
        assert [saved.step for saved in saver.poll()] in ([1], [])
        time.sleep(0.01)


def _notice(saver: BackgroundSaver, run_dir: Path, call: str) -> None:
    if call == "save":
        saver.save(run_dir, 3, _tensors(3.0), {}, keep_last=1)
    elif call == "poll":
        _poll_until_raised(saver)
    else:
        getattr(saver, call)()


def _fail_then_recover(run_dir: Path, call: str) -> None:
    saver = BackgroundSaver()
    saver.save(run_dir, 1, _tensors(1.0), {}, keep_last=1)
    first = saver.wait()
    _limit_file_size(LIMIT_BYTES)
    saver.save(run_dir, 2, _tensors(2.0), {}, keep_last=1)
    with pytest.raises(CheckpointError, match=r"could not save step 2.* not be written in full"):
        _notice(saver, run_dir, call)
    assert list_checkpoints(run_dir) == [first]
    assert (run_dir / "checkpoints/latest").read_text() == "step-00000001\n"
    assert not list((run_dir / "checkpoints").glob("tmp-*"))
    if call == "close":
        return
    assert saver.wait() == first  # told once
    _limit_file_size(resource.RLIM_INFINITY)
    saver.save(run_dir, 4, _tensors(4.0), {}, keep_last=1)
    assert saver.wait() == checkpoint_path(run_dir, 4)
    saver.close()


def _fail_at_save(run_dir: Path) -> None:
    _fail_then_recover(run_dir, "save")


def _fail_at_poll(run_dir: Path) -> None:
    _fail_then_recover(run_dir, "poll")


def _fail_at_wait(run_dir: Path) -> None:
    _fail_then_recover(run_dir, "wait")


def _fail_at_close(run_dir: Path) -> None:
    _fail_then_recover(run_dir, "close")


@pytest.mark.parametrize("work", [_fail_at_save, _fail_at_poll, _fail_at_wait, _fail_at_close])
def test_a_failed_save_is_an_error_at_the_next_call(
    tmp_path: Path, work: Callable[[Path], None]
) -> None:
    _in_fork(work, tmp_path)
    (path,) = list_checkpoints(tmp_path)
    assert _stored_value(path) == (1.0 if work is _fail_at_close else 4.0)


def _end_beside_a_failed_save(run_dir: Path) -> None:
    with BackgroundSaver() as saver:
        _limit_file_size(LIMIT_BYTES)
        saver.save(run_dir, 1, _tensors(), {}, keep_last=1)
        raise DataError("the first")


def _raise_beside_a_failed_save(run_dir: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match="the first"):
            _end_beside_a_failed_save(run_dir)
    assert [str(w.message).split(" in ")[0] for w in told] == ["could not save step 1"]


def test_a_failed_save_does_not_hide_the_error_that_ended_training(tmp_path: Path) -> None:
    _in_fork(_raise_beside_a_failed_save, tmp_path)


def test_leaving_waits_for_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = _Gate(monkeypatch)
    opener = threading.Timer(0.1, gate.opened.set)
    with BackgroundSaver() as saver:
        saver.save(tmp_path, 1, _tensors(), {}, keep_last=1)
        opener.start()
    assert gate.events[-1] == "written 1"
    opener.join()
    saver.close()  # again: nothing
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def _die_half_way(run_dir: Path) -> None:
    saver = BackgroundSaver()
    saver.save(run_dir, 1, _tensors(1.0), {}, keep_last=1)
    saver.wait()
    store.describe_files = lambda _: os._exit(9)  # tensors are on disk, no manifest is
    saver.save(run_dir, 2, _tensors(2.0), {}, keep_last=1)
    saver.wait()


def test_killed_half_way_the_last_good_checkpoint_is_there(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="exit code 9"):
        _in_fork(_die_half_way, tmp_path)
    assert list((tmp_path / "checkpoints").glob("tmp-*/*.distcp"))
    clean_stale(tmp_path)
    path, rejected = latest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 1)
    assert rejected == []
    assert _stored_value(path) == 1.0
    assert [p.name for p in (tmp_path / "checkpoints").glob("tmp-*")] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_are_copied_before_they_change(tmp_path: Path) -> None:
    meeting = dist.FileStore(str(tmp_path / "meeting"), 1)
    dist.init_process_group("nccl", store=meeting, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        staging = HostStaging()
        for value in (1.0, 2.0):
            plain = torch.full((1 << 24,), value, device="cuda")
            sharded = distribute_tensor(plain.view(1 << 12, -1), mesh, [Shard(0)])
            staging.fill({"plain": plain, "sharded": sharded})
            plain.zero_()
            sharded.to_local().zero_()
            copy = staging.tensors["sharded"]
            assert isinstance(copy, DTensor)
            assert copy.placements == sharded.placements
            for tensor in (staging.tensors["plain"], copy.to_local()):
                assert tensor.is_pinned()
                assert tensor.unique().tolist() == [value]
            save_checkpoint(tmp_path, int(value), staging.tensors, {}, keep_last=2)
            stored = load_tensors(checkpoint_path(tmp_path, int(value)), ["plain", "sharded"])
            assert all(tensor.unique().tolist() == [value] for tensor in stored.values())
    finally:
        dist.destroy_process_group()
