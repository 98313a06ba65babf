"""The Triton backends: equal to the PyTorch ones where they run, plain about why where not."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.triton_cases import CASES, Errors
from trinity.core.errors import ConfigError
from trinity.ops.attention import forgetting_attention
from trinity.ops.conv import causal_conv
from trinity.ops.scan import scan

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
TOLERANCE = 2e-5
"""In fp32, where products are IEEE ones on a GPU too."""


@functools.cache
def interpreted() -> dict[str, Errors]:
    """Errors of all cases, from one interpreting process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_small(errors: Errors) -> None:
    """Every error below the tolerance."""
    assert len(errors) >= 3
    large = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not large, large


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str) -> None:
    assert_small(interpreted()[case])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str) -> None:
    assert_small(CASES[case]("cuda"))


def _calls() -> dict[str, functools.partial[object]]:
    x_BSHd = torch.randn(1, 8, 2, 16)
    rates_BSH = torch.zeros(1, 8, 2)
    x_BHSd, rates_BHS = x_BSHd.transpose(1, 2), rates_BSH.transpose(1, 2)
    return {
        "scan": functools.partial(scan, x_BSHd, x_BSHd, x_BSHd, rates_BSH),
        "forgetting attention": functools.partial(
            forgetting_attention, x_BHSd, x_BHSd, x_BHSd, rates_BHS, document_ids_BS=None
        ),
        "convolution": functools.partial(causal_conv, x_BSHd.flatten(2), torch.randn(32, 2), None),
    }


@pytest.mark.parametrize("what", ["scan", "forgetting attention", "convolution"])
def test_says_what_is_missing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = _calls()[what]
    with pytest.raises(ConfigError, match=rf"triton {what}: .*CUDA.*otherwise use backend="):
        call(backend="triton")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    with pytest.raises(ConfigError, match=r"needs Triton.*pip install triton"):
        call(backend="triton")
    call(backend="auto")


def test_says_which_shapes_have_no_kernel() -> None:
    x_BSHd, rates_BSH = torch.randn(1, 8, 2, 24), torch.zeros(1, 8, 2)
    with pytest.raises(ConfigError, match=r'head dim 24.*otherwise use backend="chunked"'):
        scan(x_BSHd, x_BSHd, x_BSHd, rates_BSH, backend="triton")
    x_BHSd = torch.randn(1, 2, 8, 16)
    with pytest.raises(ConfigError, match="keys before the first query"):
        forgetting_attention(
            x_BHSd[:, :, 4:],
            x_BHSd,
            x_BHSd,
            torch.zeros(1, 2, 8),
            document_ids_BS=None,
            backend="triton",
        )
    with pytest.raises(ConfigError, match="auto, torch or triton"):
        causal_conv(torch.randn(1, 8, 4), torch.randn(4, 2), None, backend="cuda")
