"""Softmax attention with a forget gate against its reference, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import NEEDS_GPU, assert_small, cases_of

CASES = cases_of("forgetting")
CUT_CASES = ("documents", "very fast decay")


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, interpreted_cases):
    assert_small(interpreted_cases("forgetting")[case], torch.float32)


@pytest.mark.parametrize("case", CUT_CASES)
def test_interpreted_with_tf32_products(case, interpreted_cases):
    assert_small(interpreted_cases("forgetting", "float16", *CUT_CASES)[case], torch.float16)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, dtype):
    assert_small(CASES[case](torch.device("cuda"), dtype), dtype)
