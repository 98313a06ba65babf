"""A run that hangs says where, because of which rank, and ends with a status of its own."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trinity.core import job
from trinity.core.run_files import METRICS_FILE
from trinity.train import watchdog as watchdog_module
from trinity.train.guard import watch
from trinity.train.metrics import read_metrics
from trinity.train.watchdog import (
    HANG_EXIT_CODE,
    RECORDER_DIR,
    Watchdog,
    diagnose,
    dump_path,
    read_dumps,
)

FORK = mp.get_context("fork")
HANG_S = 1.0
TIMEOUT_S = 60


class Victims:
    """Processes that may hang, and what they print."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[Any] = []

    def start(self, work: Callable[[], None], world_size: int = 1) -> None:
        """Run ``work`` in processes of their own, joined to a group where they are several."""
        for rank in range(world_size):
            process = FORK.Process(target=self._enter, args=(rank, world_size, work))
            process.start()
            self.processes.append(process)

    def _enter(self, rank: int, world_size: int, work: Callable[[], None]) -> None:
        log = os.open(self.directory / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        watchdog_module.faulthandler.enable(file=2)
        os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
        torch.set_num_threads(1)
        if world_size > 1:
            meeting = dist.FileStore(str(self.directory / "meeting"), world_size)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world_size)
        work()
        os._exit(0)

    def status(self, rank: int = 0) -> int | None:
        """Exit status of a process, negative for a signal; waits for it."""
        self.processes[rank].join(TIMEOUT_S)
        return self.processes[rank].exitcode

    def log(self, rank: int = 0) -> str:
        """What a process printed."""
        return (self.directory / f"log-{rank}").read_text()


@pytest.fixture
def victims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Victims]:
    monkeypatch.setattr(watchdog_module, "GATHER_S", 3.0)
    victims = Victims(tmp_path)
    yield victims
    for process in victims.processes:
        if process.is_alive():
            process.kill()
        process.join()


def test_a_step_that_never_ends(victims: Victims, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 6, "time": 1.0}\n{"kind": "tr')

    def work() -> None:
        with Watchdog(tmp_path, HANG_S) as watchdog:
            for step in range(7):
                watchdog.doing(f"step {step + 1}", step)
            wait_forever()

    def wait_forever() -> None:
        os.read(os.pipe()[0], 1)

    victims.start(work)
    assert victims.status() == HANG_EXIT_CODE
    assert "rank 0: step 7 took longer than" in victims.log()
    assert "in wait_forever" in victims.log()
    (event,) = read_metrics(tmp_path, "event")
    assert (event["event"], event["step"]) == ("hang", 6)
    assert "step 7, at" in event["text"]
    assert "test_watchdog.py" in event["text"]
    assert "in wait_forever" in event["text"]
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in (lines[0], lines[2])] == ["train", "event"]


def _collectives(run_dir: Path, culprit: Callable[[], None]) -> Callable[[], None]:
    """Steps of one all-reduce; in the fourth, rank 1 does something else."""

    def work() -> None:
        pair = dist.new_group([0, 1])
        with Watchdog(run_dir, HANG_S) as watchdog:
            for step in range(6):
                watchdog.doing(f"step {step + 1}", step)
                dist.all_reduce(torch.ones(3))
                if job.rank() < 2:
                    dist.all_reduce(torch.ones(2), group=pair)
                if step == 3 and job.rank() == 1:
                    culprit()

    return work


def test_the_rank_that_others_wait_for_is_named(victims: Victims, tmp_path: Path) -> None:
    def dawdle() -> None:
        time.sleep(TIMEOUT_S)

    victims.start(_collectives(tmp_path, dawdle), world_size=3)
    assert [victims.status(rank) for rank in range(3)] == [HANG_EXIT_CODE] * 3
    (event,) = read_metrics(tmp_path, "event")
    text = event["text"]
    assert text.startswith("rank 1 on ")
    assert "lags behind (call 4 of 5 in group 0 default_pg): step 4, at" in text
    assert "in dawdle" in text
    assert "rank 0" not in text
    assert "rank 2" not in text
    assert f"hang: {text}" in victims.log(0)
    assert "hang: " not in victims.log(2)
    told = subprocess.run(
        [sys.executable, "-m", "trinity.train.watchdog", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert told.stdout == text.replace("; ", "\n") + "\n", told.stderr


def test_a_frozen_rank_is_the_one_that_does_not_answer(victims: Victims, tmp_path: Path) -> None:
    def freeze() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    victims.start(_collectives(tmp_path, freeze), world_size=2)
    assert victims.status(0) == HANG_EXIT_CODE
    (event,) = read_metrics(tmp_path, "event")
    assert event["text"] == ("rank 1 did not answer: frozen, dead, or cut off from the file system")


@pytest.mark.slow
def test_when_the_first_rank_is_frozen_the_next_one_speaks(
    victims: Victims, tmp_path: Path
) -> None:
    def work() -> None:
        with Watchdog(tmp_path, HANG_S):
            dist.barrier()
            if job.rank() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.barrier()

    watchdog_module.FIRST_STEP, before = 1.0, watchdog_module.FIRST_STEP
    try:
        victims.start(work, world_size=2)
    finally:
        watchdog_module.FIRST_STEP = before
    assert victims.status(1) == HANG_EXIT_CODE
    assert "hang: rank 0 did not answer" in victims.log(1)
    assert not (tmp_path / METRICS_FILE).exists()  # others than the first write no journal


def test_a_main_thread_that_never_lets_go_of_python(victims: Victims, tmp_path: Path) -> None:
    """PyDLL calls C without releasing the interpreter, as a broken extension would."""

    def work() -> None:
        with Watchdog(tmp_path, HANG_S) as watchdog:
            watchdog.doing("step 1", 0)
            time.sleep(0.5)  # the guard is told the limit
            hog()

    def hog() -> None:
        ctypes.PyDLL(None).sleep(TIMEOUT_S)

    victims.start(work)
    assert victims.status() == -signal.SIGABRT
    assert "no Python thread ran for" in victims.log()
    assert "in hog" in victims.log()


@pytest.mark.parametrize("with_guard", [False, True])
def test_a_process_that_was_stopped_and_goes_on_is_not_ended(
    victims: Victims, tmp_path: Path, with_guard: bool
) -> None:
    """Longer than the limit, alone, or with the guard as when Slurm suspends a job."""
    pids, (reader, writer) = FORK.SimpleQueue(), os.pipe()

    def work() -> None:
        with Watchdog(tmp_path, HANG_S) as watchdog:
            watchdog.doing("step 1", 0)
            time.sleep(0.3)
            assert watchdog._guard is not None
            pids.put((os.getpid(), watchdog._guard.pid))
            os.read(reader, 1)  # stopped here
            time.sleep(0.3)

    victims.start(work)
    stopped = pids.get()[: 2 if with_guard else 1]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4 * HANG_S)
    os.write(writer, b"!")
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert victims.status() == 0, victims.log()
    assert victims.log() == ""


def test_other_work_has_its_own_limit_and_none_is_none(victims: Victims, tmp_path: Path) -> None:
    def work() -> None:
        with Watchdog(tmp_path, HANG_S) as watchdog:
            time.sleep(1.5 * HANG_S)  # the first step
            watchdog.doing("validation", 1, times=10)
            time.sleep(1.5 * HANG_S)
        with Watchdog(tmp_path, 0) as watchdog:
            watchdog.doing("step 1", 0)
            assert threading.active_count() == 1

    victims.start(work)
    assert victims.status() == 0, victims.log()


def test_traces_of_the_attempt_before_are_kept_apart(tmp_path: Path) -> None:
    path = dump_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"rank": 0}')
    with Watchdog(tmp_path, 60):
        assert read_dumps(tmp_path) == {}
    assert [p.name for p in (tmp_path / RECORDER_DIR).iterdir()] == ["rank_0.previous.json"]


def _dump(rank: int, *calls: tuple[str, int, bool], call: str = "all_reduce") -> dict[str, Any]:
    trace = [{"group": g, "number": n, "call": call, "done": done} for g, n, done in calls]
    return {"rank": rank, "host": "h", "doing": "step 3", "where": "x.py:1 in f", "trace": trace}


def test_a_rank_that_waits_itself_is_not_the_culprit() -> None:
    """0 waits for 1 in group A, 1 waits for 2 in group B, 2 is elsewhere."""
    dumps = {
        0: _dump(0, ("A", 5, False)),
        1: _dump(1, ("A", 4, True), ("B", 7, False)),
        2: _dump(2, ("B", 6, True)),
    }
    (line,) = diagnose(dumps, 3)
    assert line.startswith("rank 2 on h lags behind (call 6 of 7 in group B): step 3")


def test_calls_that_differ_are_told() -> None:
    dumps = {
        0: _dump(0, ("A", 5, False), call="all_reduce [[3]]"),
        1: _dump(1, ("A", 5, False), call="broadcast [[3]]"),
    }
    assert diagnose(dumps, 2) == [
        "group A: call 5 differs between ranks: all_reduce [[3]], broadcast [[3]]"
    ]


def test_a_network_that_lost_something_is_told() -> None:
    (line,) = diagnose({rank: _dump(rank, ("A", 5, False)) for rank in range(2)}, 2)
    assert "look at the network" in line


def test_the_guard_ends_with_its_parent() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.dup2(reader, 0)
        watch(os.getppid(), tick_s=0.05)
        os._exit(0)
    os.write(writer, b"60\n")
    os.close(writer)
    os.close(reader)
    pidfd = os.pidfd_open(child)
    assert select.select([pidfd], [], [], TIMEOUT_S)[0]
    assert os.waitpid(child, 0)[1] == 0
