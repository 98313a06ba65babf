"""Which checkpoints of a run stay on disk."""

from __future__ import annotations

from collections.abc import Iterable


def expired_steps(
    steps: Iterable[int], saved_step: int, *, keep_last: int, keep_every_steps: int
) -> list[int]:
    """The steps whose checkpoints may be deleted now that ``saved_step`` is on disk.

    Args:
        steps: all steps with a checkpoint, in any order.
        keep_last: how many of the newest up to ``saved_step`` to keep, itself included. Later ones,
            which a resume passed over as damaged, are left alone until training gets there.
        keep_every_steps: a multiple of it is never deleted, and does count among the newest.
            0: no step is exempt.
    """
    older = sorted((step for step in steps if step < saved_step), reverse=True)
    return [
        step
        for step in older[keep_last - 1 :]
        if keep_every_steps == 0 or step % keep_every_steps != 0
    ]
