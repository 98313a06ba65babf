"""Context parallelism: the ranks of a group hold consecutive parts of the same rows.

Everything but attention works on each token alone. Before attention, a rank is sent the keys and
values that its queries see and earlier ranks hold: the last ``window - 1`` for a sliding-window
layer, all for a global one. Nothing is sent to a rank that comes earlier, so a global layer moves
half of what an all-gather would.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.parallel.collectives import exchange_rows


class KeyValueHalo:
    """Fetches the keys and values that precede this rank's part of the rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, k_BGSd: Tensor, v_BGSd: Tensor, document_ids_BS: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and document ids of the halo and the own part, in the order of positions.

        ``document_ids_BS`` covers the whole rows on every rank.
        """
        rank, num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        part = k_BGSd.shape[2]
        send, receive = halo_positions(rank, num_ranks, part, window)
        rows_SX = torch.cat((k_BGSd, v_BGSd), dim=-1).permute(2, 0, 1, 3)
        # The last positions of this part, once for each later rank, in the order of ranks.
        pieces = [rows_SX[part - count :] for count in send if count]
        outgoing = torch.cat(pieces) if pieces else rows_SX[:0]
        halo_SX = exchange_rows(outgoing, send, receive, self.group)
        both_BGSd = torch.cat((halo_SX, rows_SX)).permute(1, 2, 0, 3)
        k_BGSd, v_BGSd = both_BGSd.chunk(2, dim=-1)
        if document_ids_BS is not None:
            end = (rank + 1) * part
            document_ids_BS = document_ids_BS[:, end - k_BGSd.shape[2] : end]
        return k_BGSd.contiguous(), v_BGSd.contiguous(), document_ids_BS


def halo_positions(
    rank: int, num_ranks: int, part: int, window: int | None
) -> tuple[list[int], list[int]]:
    """How many positions ``rank`` sends to, and receives from, each rank.

    Args:
        part: positions of each rank.
        window: keys a query sees, itself included; None sees everything before.
    """

    def needed(distance: int) -> int:
        """Positions that a rank needs of the rank ``distance`` before it: always the last ones."""
        if distance <= 0:
            return 0
        if window is None:
            return part
        return min(max(window - 1 - (distance - 1) * part, 0), part)

    send = [needed(other - rank) for other in range(num_ranks)]
    receive = [needed(rank - other) for other in range(num_ranks)]
    return send, receive
