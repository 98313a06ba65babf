"""Context parallelism: the ranks of a group hold consecutive parts of the same rows.

Everything but mixers works on each token alone. Before attention, a rank is sent the keys and
values that its queries see and earlier ranks hold: the last ``window - 1`` for a sliding-window
layer, all for a global one. Nothing is sent to a rank that comes earlier, so a global layer moves
half of what an all-gather would.

A linear-time layer needs no tokens of other ranks but what its convolution reads: what came before
is a state. Each rank finds the state that its part alone leads to, all are gathered, and each rank
adds up those before it, decayed by what lies between (state passing, arXiv 2405.21060, section 8).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.nn.block import Block
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.scan_mixer import ScanMixer
from trinity.ops.scan_inputs import runs_of
from trinity.parallel.collectives import exchange_rows, gather_dim


def share_rows(blocks: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Let the mixers of ``blocks`` work on parts of rows."""
    halo, states = KeyValueHalo(group), StatePassing(group)
    for block in blocks:
        assert isinstance(block, Block)
        if isinstance(block.mixer, ScanMixer):
            block.mixer.context = states
            if isinstance(block.mixer, LinearMixer):
                block.mixer.attention_context = halo.with_decays
        elif block.mixer is not None:
            block.mixer.context = halo


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
        k_BGSd, v_BGSd = both_BGSd.split((k_BGSd.shape[-1], v_BGSd.shape[-1]), dim=-1)
        if document_ids_BS is not None:
            end = (rank + 1) * part
            document_ids_BS = document_ids_BS[:, end - k_BGSd.shape[2] : end]
        return k_BGSd.contiguous(), v_BGSd.contiguous(), document_ids_BS

    def with_decays(
        self,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        log_decay_BGS: Tensor,
        document_ids_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All keys, values and log decays up to the end of this part, and their document ids."""
        # Decays are fp32, keys and values may be narrower: two exchanges.
        column_BGS1 = log_decay_BGS.unsqueeze(-1)
        decays, _, _ = self(column_BGS1, column_BGS1[..., :0], None, None)
        keys, values, document_ids_BS = self(k_BGSd, v_BGSd, document_ids_BS, None)
        return keys, values, decays.squeeze(-1), document_ids_BS


class StatePassing:
    """Hands states, and the last rows before a part, from each rank to those after it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)

    def own_ids(self, document_ids_BS: Tensor | None) -> Tensor | None:
        """Ids of this part, given those of the whole rows."""
        if document_ids_BS is None:
            return None
        return document_ids_BS.chunk(self.num_ranks, 1)[self.rank]

    def rows_before(self, x_BSC: Tensor, count: int, document_ids_BS: Tensor | None) -> Tensor:
        """The ``count`` rows before this part; zeros where they are of another document."""
        part = x_BSC.shape[1]
        assert count <= part  # check_layout has refused this
        send, receive = [0] * self.num_ranks, [0] * self.num_ranks
        if self.rank + 1 < self.num_ranks:
            send[self.rank + 1] = count
        if self.rank > 0:
            receive[self.rank - 1] = count
        # The first rank has nothing before it, the last has nobody to send to.
        outgoing_SBC = x_BSC.transpose(0, 1)[part - sum(send) :]
        before_SBC = exchange_rows(outgoing_SBC, send, receive, self.group)
        if self.rank == 0:
            # Zeros, joined to the nothing that arrived: the backward must take part as well.
            zeros_SBC = x_BSC.new_zeros(count, x_BSC.shape[0], x_BSC.shape[2])
            return torch.cat((zeros_SBC, before_SBC)).transpose(0, 1)
        before_BwC = before_SBC.transpose(0, 1)
        if document_ids_BS is not None:
            run_BS = runs_of(document_ids_BS)
            first = self.rank * part
            same_Bw = run_BS[:, first - count : first] == run_BS[:, first : first + 1]
            before_BwC = before_BwC * same_Bw.unsqueeze(-1)
        return before_BwC

    def initial_state(
        self, state: Tensor, log_decay_BSU: Tensor, document_ids_BS: Tensor | None
    ) -> Tensor:
        """The state before this part.

        Args:
            state: (B, U, features, e), what this part alone comes to.
            log_decay_BSU: of this part.
            document_ids_BS: of the whole rows.
        """
        decay_BU = log_decay_BSU.sum(1).exp()
        # Of all parts, the states and how much they leave of what came before: (ranks, B, U, ...).
        own = torch.cat((state.flatten(2), decay_BU.unsqueeze(-1)), dim=2)
        gathered = gather_dim(own.unsqueeze(0), self.group, 0)
        states = gathered[..., :-1].unflatten(-1, state.shape[2:])
        kept = gathered[..., -1:].unsqueeze(-1)
        into = kept.new_ones(self.num_ranks, 1, 1, 1, 1)
        if document_ids_BS is not None:
            run_BrS = runs_of(document_ids_BS).unflatten(1, (self.num_ranks, -1))
            first_rB, last_rB = run_BrS[..., 0].T, run_BrS[..., -1].T
            kept = kept * (first_rB == last_rB)[..., None, None, None]
            # Of the first part nothing is asked: nothing comes before it.
            into = (first_rB == last_rB.roll(1, 0))[..., None, None, None]
        before = states[:0].sum(0)  # zeros; the backward of the first rank must take part as well
        for rank in range(self.rank):
            before = before * (kept[rank] * into[rank]) + states[rank]
        return before * into[self.rank]


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
