"""Instruments under every kind of layout against one process, and a rank that is slow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
import torch

from tests.train.probe_cases import make_config, make_trainer, train
from tools.ledger import HYBRID, LAYOUTS, axes_as_overrides, world_size_of
from tools.ranks import on_ranks
from trinity.core import job
from trinity.core.config import Config
from trinity.train import probe_attention, probe_hooks
from trinity.train.probe_work import FixedWork
from trinity.train.probes import Probes

OF_RANKS = {"rank_ms", "late_ms", "straggler", "straggler_rank"}
CASES: dict[str, tuple[dict[str, object], list[str]]] = {
    "hsdp2x2 x ep2": ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, []),
    "fsdp2 x ep2": (LAYOUTS["fsdp2 x ep2"], []),
    "tp2+sp": (LAYOUTS["tp2+sp"], []),
    "tp2, full recompute": (LAYOUTS["tp2"], ["train.recompute=full"]),
    "cp2, hybrid": (LAYOUTS["cp2"], HYBRID),
    "pp2 zbv": (
        {
            "pp": 2,
            "pp_schedule": "zbv",
            "pp_stages_per_rank": 2,
            "reshard_after_forward": False,
        },
        [],
    ),
    "pp2, hybrid": (LAYOUTS["pp2"], HYBRID),
}
Readings = list[dict[str, object]]


def _readings(config: Config) -> Readings:
    """Of two steps, with a silent expert."""
    trainer = make_trainer(config)
    for row, moe in trainer.model.moe_rows():
        if row == 1:
            with torch.no_grad():
                _silence(trainer.model.config.model.num_experts, moe.experts)
    probes = Probes(trainer.model, trainer.optimizers)
    return [train(trainer, step, probes) for step in range(2)]


def _silence(num_experts: int, experts: torch.nn.Module) -> None:
    """Make expert 5 next to nothing wherever it lies."""
    down = dict(experts.named_parameters())["down"]
    factor = torch.ones(num_experts, 1, 1, dtype=down.dtype)
    factor[5] = 1e-6
    if isinstance(down, torch.distributed.tensor.DTensor):
        whole = torch.distributed.tensor.distribute_tensor(
            (down.full_tensor() * factor).detach(), down.device_mesh, down.placements
        )
        down.to_local().copy_(whole.to_local())
    else:
        down *= factor


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth token of a row, which forked ranks inherit."""
    monkeypatch.setattr(probe_attention, "QUERIES", 16)
    monkeypatch.setattr(probe_hooks, "HEAD_TOKENS", 16)


@pytest.fixture(scope="module")
def singles() -> dict[tuple[str, ...], Readings]:
    """One-process readings by overrides, each made once."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_readings_equal_those_of_one_process(
    singles: dict[tuple[str, ...], Readings], name: str
) -> None:
    axes, overrides = CASES[name]
    key = tuple(HYBRID if overrides == HYBRID else [])
    if key not in singles:
        singles[key] = _readings(make_config(key))
    config = make_config([*axes_as_overrides(axes), *overrides])
    by_rank = on_ranks(world_size_of(axes), _readings, config)
    assert all(readings == by_rank[0] for readings in by_rank)
    assert singles[key][0]["silent_experts"] == 1
    for one, other in zip(singles[key], by_rank[0], strict=True):
        assert one.keys() == other.keys()
        for name_of in one.keys() - OF_RANKS:
            if one[name_of] is None:
                assert other[name_of] is None, name_of
            else:
                assert other[name_of] == pytest.approx(one[name_of], rel=1e-6), name_of
        rank_ms, straggler = other["rank_ms"], other["straggler"]
        assert isinstance(rank_ms, list)
        assert len(rank_ms) == world_size_of(axes)
        assert min(rank_ms) > 0
        assert isinstance(straggler, float)
        assert straggler >= 1


@contextmanager
def _busy(core: int) -> Iterator[None]:
    """Six processes that do nothing but use the core: more than whatever else is on the machine."""
    processes = [get_context("fork").Process(target=_burn, args=(core,)) for _ in range(6)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _burn(core: int) -> None:
    os.sched_setaffinity(0, {core})
    deadline_s = time.monotonic() + 60  # whatever happens to the test
    while time.monotonic() < deadline_s:
        pass


def _stragglers(cores: list[int]) -> list[tuple[object, object]]:
    os.sched_setaffinity(0, {cores[job.rank()]})
    trainer = make_trainer(make_config(["parallel.dp_shard=2"], "fp32"))
    probes = Probes(trainer.model, trainer.optimizers)
    found = []
    for step in range(4):
        record = train(trainer, step, probes)
        found.append((record["straggler"], record["straggler_rank"]))
    return found


@pytest.mark.slow
def test_a_rank_that_shares_its_core_is_named() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    with _busy(cores[1]):
        found = on_ranks(2, _stragglers, cores[:2])[0]
    slow = [rank for straggler, rank in found if isinstance(straggler, float) and straggler > 1.5]
    assert slow.count(1) >= 3, found


@pytest.mark.slow
def test_ranks_that_are_left_alone_are_no_stragglers() -> None:
    """Needs a machine that does nothing else."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    found = on_ranks(2, _stragglers, cores[:2])[0]
    slow = [straggler for straggler, _ in found if isinstance(straggler, float) and straggler > 1.5]
    assert len(slow) < 3, found


def _late(num_ms: int) -> list[dict[str, object]]:
    """Rank 1 is late for the second of two steps, which is no fault of its processor."""
    trainer = make_trainer(make_config(["parallel.dp_shard=2"], "fp32"))
    probes = Probes(trainer.model, trainer.optimizers)
    records = []
    for step in range(2):
        torch.distributed.barrier()
        if step == 1 and job.rank() == 1:
            time.sleep(num_ms / 1e3)
        with probes.arriving():
            torch.distributed.all_reduce(torch.zeros(2))
        records.append(train(trainer, step, probes))
    return records


@pytest.mark.slow
def test_a_rank_that_comes_late_is_seen() -> None:
    num_ms = 300
    by_rank = on_ranks(2, _late, num_ms)
    late_ms = by_rank[0][1]["late_ms"]
    assert by_rank[1][1]["late_ms"] == late_ms
    assert isinstance(late_ms, list)
    assert late_ms[0] == 0
    assert late_ms[1] > num_ms / 2


def _work_of(milliseconds: list[float]) -> dict[str, object]:
    trainer = make_trainer(
        make_config(["parallel.dp_shard=3", "batch.rows_per_step=3", "model.num_experts=9"])
    )
    probes = Probes(trainer.model, trainer.optimizers)
    probes.work.read = lambda: milliseconds[job.rank()]  # type: ignore[method-assign]
    probes.waiting.read = lambda: [5.0, 0.25, 4.0][job.rank()]  # type: ignore[method-assign]
    return train(trainer, 0, probes)


def test_the_slowest_rank_is_compared_with_the_median() -> None:
    record = on_ranks(3, _work_of, [2.0, 7.0, 1.5])[0]
    assert record["straggler"] == 3.5
    assert record["straggler_rank"] == 1
    assert record["rank_ms"] == [2.0, 7.0, 1.5]
    assert record["late_ms"] == [0.0, 4.75, 1.0]
    unknown = on_ranks(3, _work_of, [2.0, float("nan"), 1.5])[0]  # a GPU's first reading
    assert unknown["straggler"] is None
    assert unknown["rank_ms"] is None


def test_work_takes_time() -> None:
    work = FixedWork(torch.device("cpu"))
    assert str(work.read()) == "nan"
    work.run()
    assert 0 < work.read() < 10_000
