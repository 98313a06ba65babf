"""Causal convolution against its reference, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import NEEDS_GPU, assert_small, cases_of

CASES = cases_of("conv")


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, interpreted_cases):
    assert_small(interpreted_cases("conv")[case], torch.float32)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, dtype):
    assert_small(CASES[case](torch.device("cuda"), dtype), dtype)
