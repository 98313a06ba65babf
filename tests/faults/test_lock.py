"""One job at a time in a run directory; what dead jobs leave is taken over, by exactly one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.ranks import on_ranks
from trinity.core import job
from trinity.core.errors import CheckpointError, ConfigError, TrainingError
from trinity.train import lock as lock_module
from trinity.train.lock import LOCK_DIR, RunLock, held, require_held

FORK = multiprocessing.get_context("fork")
NUM_STARTERS = 16
FAST: dict[str, Any] = {"beat_s": 0.1, "stale_s": 1.0}


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    lock = RunLock(tmp_path, **FAST)
    yield lock
    lock.release()


def _files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / LOCK_DIR).iterdir())


def _edit(run_dir: Path, **changes: object) -> Path:
    """Change what the one lock file says of its holder."""
    (path,) = (run_dir / LOCK_DIR).iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def _abandoned(run_dir: Path, **changes: object) -> Path:
    """A lock whose holder is gone without a word."""
    holder = RunLock(run_dir)
    with contextlib.suppress(FileNotFoundError):
        _edit(run_dir, released=True)
    holder.acquire()
    holder._closing.set()
    return _edit(run_dir, **changes)


def _hold_in_another_process(run_dir: Path) -> multiprocessing.process.BaseProcess:
    ready = FORK.Event()

    def hold() -> None:
        RunLock(run_dir).acquire()
        ready.set()
        time.sleep(120)

    process = FORK.Process(target=hold, daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def test_a_living_holder_is_named_and_a_dead_one_replaced(tmp_path: Path, lock: RunLock) -> None:
    holder = _hold_in_another_process(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*end that job"):
        lock.acquire()
    assert len(_files(tmp_path)) == 1  # no candidate is left
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)  # alive, however silent
    os.utime(next((tmp_path / LOCK_DIR).iterdir()), (1, 1))
    with pytest.raises(ConfigError, match="in use by"):
        lock.acquire()
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    lock.acquire()
    assert lock.loss() is None
    holder.join()


def test_a_number_that_another_process_has_now_is_not_the_holder(
    tmp_path: Path, lock: RunLock
) -> None:
    _abandoned(tmp_path, pid=1)  # born at another time than the holder
    lock.acquire()
    assert lock.loss() is None


def test_a_released_lock_is_free_and_its_number_never_comes_back(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        lock = RunLock(tmp_path, **FAST)
        lock.acquire()
        assert _files(tmp_path) == [f"{number:08d}"]
        lock.release()
        assert _files(tmp_path) == [f"{number:08d}"]
        assert lock.loss() is not None


@pytest.mark.parametrize(("attempt", "is_taken"), [("3", True), ("2", False)])
def test_a_requeued_slurm_job_takes_over_from_its_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: str, is_taken: bool
) -> None:
    _abandoned(tmp_path, machine="another", job="77", attempt=2)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
    judge = lock_module._Watch(15, 180)
    (path,) = (tmp_path / LOCK_DIR).iterdir()
    assert judge.is_free(path, path) == is_taken
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not lock_module._Watch(15, 180).is_free(path, path)


def test_a_silent_holder_elsewhere_is_replaced_and_one_that_beats_is_not(
    tmp_path: Path, lock: RunLock
) -> None:
    path = _abandoned(tmp_path, machine="another", host="far")
    os.utime(path, (1, 1))
    lock.acquire()
    assert lock.loss() is None
    _edit(tmp_path, machine="another", host="far")  # its own thread goes on touching it
    with pytest.raises(ConfigError, match="on far"):
        RunLock(tmp_path, **FAST).acquire()


def test_a_holder_that_beats_lives_even_where_the_servers_clock_went_ahead(
    tmp_path: Path, lock: RunLock
) -> None:
    path, closing = _abandoned(tmp_path, machine="another", host="far"), threading.Event()

    os.utime(path, (0, 0))

    def beat() -> None:
        now_s = 0
        while not closing.wait(0.02):
            now_s += 1  # decades behind the time that the starter's own file will have
            os.utime(path, (now_s, now_s))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigError, match="on far"):
            lock.acquire()
    finally:
        closing.set()
        beating.join()


@pytest.mark.parametrize("touched_s", [1, 2**32])
def test_no_clock_of_a_host_is_asked_and_a_servers_may_jump(
    tmp_path: Path, lock: RunLock, monkeypatch: pytest.MonkeyPatch, touched_s: int
) -> None:
    def refuse() -> float:
        raise AssertionError("a host's wall clock")

    monkeypatch.setattr(time, "time", refuse)
    os.utime(_abandoned(tmp_path, machine="another"), (touched_s, touched_s))
    lock.acquire()
    assert lock.loss() is None


def test_a_recent_beat_by_the_servers_clock_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _abandoned(tmp_path, machine="another")
    candidate = path.with_name("candidate")
    candidate.touch()
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    watch = lock_module._Watch(15, 180)
    assert not watch.is_free(path, candidate)
    now_s[0] += 179
    assert not watch.is_free(path, candidate)
    now_s[0] += 2
    assert watch.is_free(path, candidate)


def test_a_holder_notices_that_its_lock_is_gone(tmp_path: Path, lock: RunLock) -> None:
    lock.acquire()
    lock.require()
    _edit(tmp_path, machine="another")
    os.utime(tmp_path / LOCK_DIR / "00000001", (1, 1))
    lock._closing.set()  # as good as frozen
    heir = RunLock(tmp_path, **FAST)
    heir.acquire()
    with pytest.raises(CheckpointError, match=r"no longer ours: process .* took it over"):
        lock.require()
    with pytest.raises(TrainingError, match="only one job"):
        require_held(lock)
    lock.release()  # and does not give away what is no longer its own
    assert heir.loss() is None
    (tmp_path / LOCK_DIR / "00000002").unlink()
    with pytest.raises(CheckpointError, match="was removed"):
        heir.require()


def test_a_starter_that_was_slow_does_not_take_a_number_that_is_past(
    tmp_path: Path, lock: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.acquire()
    lock.release()
    others = [RunLock(tmp_path), RunLock(tmp_path)]
    link = os.link

    def be_slow(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        others[0].acquire()
        others[0].release()
        others[1].acquire()
        assert _files(tmp_path)[0] == "00000003"  # the second, which is linked now, is gone
        link(source, target)

    monkeypatch.setattr(os, "link", be_slow)
    with pytest.raises(ConfigError, match="in use by"):
        lock.acquire()
    assert others[1].loss() is None
    assert _files(tmp_path) == ["00000003"]
    others[1].release()


def _start_all_at_once(run_dir: Path, work: Callable[[RunLock], object]) -> list[bool]:
    """Whether each of many processes got the lock; all keep what they have until all know."""
    gate, done, results = FORK.Barrier(NUM_STARTERS), FORK.Barrier(NUM_STARTERS), FORK.Queue()

    def start() -> None:
        lock = RunLock(run_dir, **FAST)
        gate.wait(60)
        try:
            work(lock)
            won = True
        except ConfigError:
            won = False
        done.wait(60)
        results.put(won)
        assert not won or lock.loss() is None

    processes = [FORK.Process(target=start, daemon=True) for _ in range(NUM_STARTERS)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return outcomes


@pytest.mark.parametrize("before", ["nothing", "released", "dead", "silent"])
def test_of_many_starters_exactly_one_wins(tmp_path: Path, before: str) -> None:
    for number in range(4):
        run_dir = tmp_path / str(number)
        if before != "nothing":
            changes = {"released": {"released": True}, "dead": {"born": 1.0}, "silent": {}}[before]
            path = _abandoned(run_dir, **changes)
        if before == "silent":
            os.utime(_edit(run_dir, machine="another"), (1, 1))
            assert path.exists()
        assert sum(_start_all_at_once(run_dir, RunLock.acquire)) == 1


def _take(run_dir: Path, dice: random.Random) -> RunLock:
    while True:
        lock = RunLock(run_dir, **FAST)
        try:
            lock.acquire()
            return lock
        except ConfigError:
            time.sleep(dice.random() / 100)


def test_who_holds_the_lock_is_alone(tmp_path: Path) -> None:
    """Processes take turns, some die holding it; what only one may do at a time is never torn."""
    counter, num_turns, num_processes = tmp_path / "counter", 12, 5
    counter.write_text("0")

    def take_turns(seed: int) -> None:
        dice = random.Random(seed)
        for turn in range(num_turns):
            if turn % 4 == seed % 4 and os.fork() == 0:
                _take(tmp_path, dice)
                os._exit(0)
            lock = _take(tmp_path, dice)
            number = int(counter.read_text())
            time.sleep(dice.random() / 200)
            counter.write_text(str(number + 1))
            assert lock.loss() is None
            lock.release()
        os._exit(0)

    processes = [FORK.Process(target=take_turns, args=(seed,)) for seed in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counter.read_text() == str(num_turns * num_processes)


def test_a_directory_that_cannot_be_locked_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / LOCK_DIR).write_text("a file")
    with pytest.raises(ConfigError, match="cannot lock the run"):
        RunLock(tmp_path).acquire()


def test_all_ranks_hear_of_a_refusal_and_of_a_loss(tmp_path: Path) -> None:
    def work() -> list[str]:
        told = []
        with held(tmp_path / "free") as lock:
            require_held(lock)
            if lock is not None:
                lock._own = None
            with pytest.raises(TrainingError) as loss:
                require_held(lock)
            told.append(str(loss.value))
        with pytest.raises(ConfigError) as refusal, held(tmp_path / "taken"):
            pytest.fail(f"rank {job.rank()} got in")
        return [*told, str(refusal.value)]

    holder = RunLock(tmp_path / "taken")
    holder.acquire()
    first, second = on_ranks(2, work)
    assert first == second
    assert "in use by" in first[1]
    holder.release()
