"""Which checkpoints stay, by hand-computed tables."""

from __future__ import annotations

import pytest

from trinity.ckpt.retention import expired_steps


@pytest.mark.parametrize(
    ("steps", "saved_step", "keep_last", "keep_every_steps", "expired"),
    [
        ([], 5, 1, 0, []),
        ([5], 5, 1, 0, []),
        ([5], 5, 1, 1, []),
        ([3, 1, 5, 4, 2], 5, 1, 0, [4, 3, 2, 1]),
        ([3, 1, 5, 4, 2], 5, 2, 0, [3, 2, 1]),
        ([3, 1, 5, 4, 2], 5, 9, 0, []),
        ([1, 2, 3, 4, 5, 6, 7], 7, 1, 3, [5, 4, 2, 1]),
        ([1, 2, 3, 4, 5, 6, 7], 7, 2, 3, [5, 4, 2, 1]),  # 6 is one of the newest two anyway
        ([1, 2, 3, 4, 5, 6, 7], 7, 3, 3, [4, 2, 1]),
        ([1, 2, 3], 3, 1, 1, []),
        ([0, 1, 2], 2, 1, 100, [1]),  # zero is a multiple of everything
        ([8, 10, 12], 10, 1, 0, [8]),  # later ones are left alone
        ([8, 10, 12], 10, 1, 4, []),
        ([99_999_999, 100_000_000], 100_000_000, 1, 0, [99_999_999]),
    ],
)
def test_expired_steps(
    steps: list[int], saved_step: int, keep_last: int, keep_every_steps: int, expired: list[int]
) -> None:
    found = expired_steps(steps, saved_step, keep_last=keep_last, keep_every_steps=keep_every_steps)
    assert found == expired
