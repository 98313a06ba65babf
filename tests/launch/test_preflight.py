"""What `trinity preflight` measures, and what it makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.ranks import on_ranks
from trinity.train.preflight import Report, examine, find_problems, find_slow, gather, partners

FIT = Report(
    rank=0,
    node="n1",
    versions="torch 2",
    num_gpus=8,
    gpu_memory_taken=0.01,
    free_gb=100.0,
    directory_error="",
    sees_shared_file=True,
    sum_is_right=True,
    matmul_tflops=600.0,
    exchange_gb_per_s=40.0,
    all_reduce_gb_per_s=40.0,
    clock_offset_s=0.0,
    clock_error_s=0.001,
)


def _job(**on_the_last: object) -> list[Report]:
    """Four nodes of one rank; the last one is different."""
    reports = [FIT._replace(rank=rank, node=f"n{rank + 1}") for rank in range(4)]
    return [*reports[:3], reports[3]._replace(**on_the_last)]


def test_machines_that_are_alike_are_fit() -> None:
    assert find_problems(_job(), min_free_gb=10) == []
    assert find_slow(_job()) == []


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ({"versions": "torch 1"}, "versions differ (rank 3 on n4: torch 1; rank 0 on n1: torch 2)"),
        ({"num_gpus": 7}, "numbers of GPUs differ (rank 3 on n4: 7; rank 0 on n1: 8)"),
        ({"node": "n1"}, "numbers of ranks differ"),
        ({"free_gb": 9.0}, "rank 3 on n4: 9.0 GB free in the output directory, wanted 10"),
        ({"directory_error": "read-only"}, "rank 3 on n4 cannot use the output directory"),
        ({"sees_shared_file": False}, "rank 3 on n4 does not see what rank 0 writes"),
        ({"sum_is_right": False}, "rank 3 on n4: an all-reduce gave a wrong sum"),
        ({"gpu_memory_taken": 0.5}, "rank 3 on n4: 50% of its GPU's memory is in use already"),
        ({"clock_offset_s": -3.0}, "rank 3 on n4: its clock is -3.0 s off rank 0's"),
    ],
)
def test_each_fault_is_named_with_its_place(difference: dict[str, object], told: str) -> None:
    (problem,) = find_problems(_job(**difference), min_free_gb=10)
    assert problem.startswith(told)
    assert ";" in problem  # a remedy follows


def test_a_slow_round_trip_is_not_taken_for_a_wrong_clock() -> None:
    assert find_problems(_job(clock_offset_s=3.0, clock_error_s=2.5), min_free_gb=10) == []


def test_slow_nodes_are_named() -> None:
    assert find_slow(_job(matmul_tflops=200.0)) == [
        "n4: matrix product at 200 TFLOP/s, the median node has 600"
    ]
    (line,) = find_slow(_job(exchange_gb_per_s=5.0))
    assert line.startswith("n4: exchange with other nodes at 5 GB/s")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_partners_are_disjoint_pairs(count: int) -> None:
    rounds = list(zip(*(partners(i, count) for i in range(count)), strict=True))
    for pairs in rounds:
        assert all(partner == -1 or pairs[partner] == i for i, partner in enumerate(pairs))
    if count > 2 and count % 2 == 0:
        assert all(a != b and -1 not in (a, b) for a, b in zip(*rounds, strict=True))
    assert all(max(partners(i, count)) >= 0 for i in range(count))


def test_ranks_measure_together(tmp_path: Path) -> None:
    reports = on_ranks(3, _examine, tmp_path / "runs")
    for report in reports:
        assert report.sees_shared_file
        assert report.sum_is_right
        assert report.matmul_tflops > 0
        assert 0 < report.exchange_gb_per_s < float("inf")
        assert 0 < report.all_reduce_gb_per_s < float("inf")
        assert report.free_gb > 0
        # All clocks are one clock; the reading lies within what the round trip leaves open.
        assert abs(report.clock_offset_s) <= report.clock_error_s + 1e-6
    assert list((tmp_path / "runs").iterdir()) == []


def _examine(directory: Path) -> Report:
    report = examine(directory, torch.device("cpu"))
    assert len(gather(report)) == 3
    return report


def test_a_directory_that_cannot_be_made_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = examine(tmp_path / "file" / "runs", torch.device("cpu"))
    (problem,) = find_problems([report], min_free_gb=0)
    assert "cannot use the output directory" in problem
