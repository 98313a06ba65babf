"""Context parallelism: the ranks of a group hold consecutive parts of the same rows.

Everything but mixers works on each token alone. Before attention, a rank is sent the keys and
values that its queries see and earlier ranks hold: the last ``window - 1`` for a sliding-window
layer, all for a global one. Nothing is sent to a rank that comes earlier, so a global layer moves
half of what an all-gather would. Tokens of images also see what comes after them: there every rank
is sent all keys and values.

A linear-time layer needs no tokens of other ranks but what its convolution reads: what came before
is a state. Each rank finds the state that its part alone leads to, all are gathered, and each rank
adds up those before it, decayed by what lies between (state passing, arXiv 2405.21060, section 8).
The reverse scan of images does the same on flipped rows, whose first part the last rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trinity.nn.attention import GatedAttention
from trinity.nn.block import Block
from trinity.ops.scan_inputs import runs_of
from trinity.parallel.collectives import exchange_rows, gather_dim


def share_rows(blocks: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Let the mixers of ``blocks`` work on parts of rows."""
    ways = [PartOrder(group), PartOrder(group, reverse=True)]
    halos, states = [KeyValueHalo(way) for way in ways], [StatePassing(way) for way in ways]
    everything = WholeRows(group)
    for block in blocks:
        assert isinstance(block, Block)
        mixer = block.mixer
        if isinstance(mixer, GatedAttention):
            mixer.context = everything if mixer.is_image else halos[0]
        elif mixer is not None:
            for way, halo, passing in zip((mixer, mixer.reverse), halos, states, strict=True):
                if way is not None:
                    way.context = passing
                    way.attention_context = halo.with_decays


class PartOrder:
    """The ranks of a group in the order of the parts of the rows that they hold.

    In flipped rows that is from the last rank to the first. A rank's ``place`` is its number in
    this order.
    """

    def __init__(self, group: dist.ProcessGroup, *, reverse: bool = False) -> None:
        self.group, self.reverse = group, reverse
        rank, self.num_parts = dist.get_rank(group), dist.get_world_size(group)
        self.place = self.num_parts - 1 - rank if reverse else rank

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the last ``send[p]`` entries of ``x`` to each place p; what arrives, in order.

        ``receive[p]`` is how many place p sends to this one.
        """
        pieces = [x[len(x) - count :] for count in send]
        if not self.reverse:
            return exchange_rows(torch.cat(pieces), send, receive, self.group)
        arrived = exchange_rows(torch.cat(pieces[::-1]), send[::-1], receive[::-1], self.group)
        return torch.cat(arrived.split(receive[::-1])[::-1])

    def gather(self, x: Tensor) -> Tensor:
        """``x`` of all places, in order, (places, ...)."""
        gathered = gather_dim(x.unsqueeze(0), self.group, 0)
        return gathered.flip(0) if self.reverse else gathered


class WholeRows:
    """Fetches the keys and values of all parts of the rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, k_BGSd: Tensor, v_BGSd: Tensor, document_ids_BS: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the whole rows.

        Those of a local layer as well: what is near in an image may be far off in its row.
        """
        both_BGSX = gather_dim(torch.cat((k_BGSd, v_BGSd), dim=-1), self.group, 2)
        keys, values = both_BGSX.split((k_BGSd.shape[-1], v_BGSd.shape[-1]), dim=-1)
        return keys.contiguous(), values.contiguous(), document_ids_BS


class KeyValueHalo:
    """Fetches the keys and values that precede this rank's part of the rows."""

    def __init__(self, order: PartOrder) -> None:
        self.order = order

    def __call__(
        self, k_BGSd: Tensor, v_BGSd: Tensor, document_ids_BS: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and document ids of the halo and the own part, in the order of positions.

        ``document_ids_BS`` covers the whole rows on every rank.
        """
        place, num_parts = self.order.place, self.order.num_parts
        part = k_BGSd.shape[2]
        send, receive = halo_positions(place, num_parts, part, window)
        rows_SX = torch.cat((k_BGSd, v_BGSd), dim=-1).permute(2, 0, 1, 3)
        halo_SX = self.order.exchange(rows_SX, send, receive)
        both_BGSd = torch.cat((halo_SX, rows_SX)).permute(1, 2, 0, 3)
        k_BGSd, v_BGSd = both_BGSd.split((k_BGSd.shape[-1], v_BGSd.shape[-1]), dim=-1)
        if document_ids_BS is not None:
            end = (place + 1) * part
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

    def __init__(self, order: PartOrder) -> None:
        self.order = order

    def own_ids(self, document_ids_BS: Tensor | None) -> Tensor | None:
        """Ids of this part, given those of the whole rows."""
        if document_ids_BS is None:
            return None
        return document_ids_BS.chunk(self.order.num_parts, 1)[self.order.place]

    def rows_before(self, x_BSC: Tensor, count: int, document_ids_BS: Tensor | None) -> Tensor:
        """The ``count`` rows before this part; zeros where they are of another document."""
        place, num_parts, part = self.order.place, self.order.num_parts, x_BSC.shape[1]
        assert count <= part  # check_layout has refused this
        # The first part has nothing before it, the last has nobody to send to.
        send = [count * (other == place + 1) for other in range(num_parts)]
        receive = [count * (other == place - 1) for other in range(num_parts)]
        before_SBC = self.order.exchange(x_BSC.transpose(0, 1), send, receive)
        if place == 0:
            # Zeros, joined to the nothing that arrived: the backward must take part as well.
            zeros_SBC = x_BSC.new_zeros(count, x_BSC.shape[0], x_BSC.shape[2])
            return torch.cat((zeros_SBC, before_SBC)).transpose(0, 1)
        before_BwC = before_SBC.transpose(0, 1)
        if document_ids_BS is not None:
            run_BS = runs_of(document_ids_BS)
            first = place * part
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
        # Of all parts, the states and how much they leave of what came before: (parts, B, U, ...).
        own = torch.cat((state.flatten(2), decay_BU.unsqueeze(-1)), dim=2)
        gathered = self.order.gather(own)
        states = gathered[..., :-1].unflatten(-1, state.shape[2:])
        kept = gathered[..., -1:].unsqueeze(-1)
        into = kept.new_ones(self.order.num_parts, 1, 1, 1, 1)
        if document_ids_BS is not None:
            run_BrS = runs_of(document_ids_BS).unflatten(1, (self.order.num_parts, -1))
            first_rB, last_rB = run_BrS[..., 0].T, run_BrS[..., -1].T
            kept = kept * (first_rB == last_rB)[..., None, None, None]
            # Of the first part nothing is asked: nothing comes before it.
            into = (first_rB == last_rB.roll(1, 0))[..., None, None, None]
        before = states[:0].sum(0)  # zeros; the backward of the first part must take part as well
        for earlier in range(self.order.place):
            before = before * (kept[earlier] * into[earlier]) + states[earlier]
        return before * into[self.order.place]


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
