"""What is asked of the machine."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch

from trinity.core.runtime import Moment, allow_many_files


@pytest.fixture
def few_files() -> Iterator[int]:
    """A low soft limit; yields the hard one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    yield limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_as_many_files_as_the_machine_allows(few_files: int) -> None:
    allow_many_files()
    allow_many_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (few_files, few_files)


def test_moments_are_in_order() -> None:
    first, second = (Moment(torch.device("cpu")) for _ in range(2))
    second.wait()
    assert second.seconds_since(first) >= 0
    assert first.seconds_since(second) <= 0
