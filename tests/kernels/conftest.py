"""Interpreted cases run once per test session, however many workers share it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from filelock import FileLock

from tests.kernels.harness import Errors, interpreted


@pytest.fixture(scope="session")
def interpreted_cases(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, Errors]]:
    """Errors of all cases of a module; the first worker that asks runs them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return interpreted
    shared = tmp_path_factory.getbasetemp().parent

    def once(module: str, dtype: str = "float32", *names: str) -> dict[str, Errors]:
        path = shared / f"interpreted_{module}_{dtype}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(interpreted(module, dtype, *names)))
        return json.loads(path.read_text())

    return once
