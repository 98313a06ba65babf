"""Every kernel compiles for compute capability 9.0 and fits its shared memory; no GPU needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.kernels.compiling import MAX_SHARED_BYTES
from tests.kernels.harness import ROOT, TIMEOUT_S

slow = pytest.mark.slow


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is for x86-64")
@pytest.mark.parametrize(
    ("dtype", "d", "e"),
    [
        ("bfloat16", 64, 64),
        pytest.param("bfloat16", 128, 64, marks=slow),
        pytest.param("bfloat16", 128, 128, marks=slow),
        pytest.param("float16", 32, 32, marks=slow),
        pytest.param("float32", 16, 32, marks=slow),
    ],
)
def test_all_kernels_compile(dtype, d, e, tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", dtype, str(d), str(e)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    launches = json.loads(done.stdout.splitlines()[-1])
    assert len({launch["kernel"] for launch in launches}) == 14
    assert max(launch["shared_bytes"] for launch in launches) <= MAX_SHARED_BYTES
