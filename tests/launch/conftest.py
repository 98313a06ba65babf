"""One Slurm of two nodes for all tests of the batch script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.local_slurm import LocalSlurm, missing_programs

GRACE_S = 30
"""Between the announcement of a preemption and its end."""


@pytest.fixture(scope="session")
def slurm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cluster, the runs and their logs lie."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="session")
def cluster(slurm_root: Path) -> Iterator[LocalSlurm]:
    """The cluster; skips the test where Slurm is not installed."""
    if missing := missing_programs():
        pytest.skip(f"{missing[0]} is not on PATH; apt-get install slurm-wlm munge")
    with LocalSlurm(slurm_root / "cluster", num_nodes=2, grace_s=GRACE_S) as started:
        yield started
