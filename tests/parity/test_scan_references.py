"""Scans and forgetting attention equal outside references, forward and in every gradient.

The references live in ``.venv/references`` and are imported by a process of their own, so that
transformers, which looks for such packages, computes in plain PyTorch everywhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.reference_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = Path(sys.prefix) / "references"
TIMEOUT_S = 300

TOLERANCE = 1e-5
"""Of the largest entry of each tensor, in fp32."""
LOOSE_TOLERANCE = 3e-5
"""Where a small sum of squared weights is read from a state, token by token."""


def run_cases(folder: Path) -> subprocess.CompletedProcess[str]:
    """All cases, with the references in ``folder``."""
    return subprocess.run(
        [sys.executable, "-m", "tests.parity.reference_cases", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@functools.cache
def errors_of_all_cases() -> dict[str, dict[str, float]]:
    """From one process, on the first call."""
    done = run_cases(REFERENCES)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_equals_its_reference(case: str) -> None:
    errors = errors_of_all_cases()[case]
    assert len(errors) >= 5  # a result, and gradients of q, k, v and the decay
    loose = case.startswith("retention") and case.endswith("recurrent")
    limit = LOOSE_TOLERANCE if loose else TOLERANCE
    large = {name: error for name, error in errors.items() if not error < limit}
    assert not large, large


def test_a_missing_installation_says_what_mends_it(tmp_path: Path) -> None:
    done = run_cases(tmp_path)
    assert done.returncode != 0
    assert "make .venv/references/.ready" in done.stderr


def test_the_references_are_out_of_reach_of_all_other_tests() -> None:
    for package in ("fla", "retention", "mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(package) is None, package
