"""The largest attention logit of a layer, seen from outside while a sampled step runs.

Queries are taken where the layer's norm leaves them, keys where the layer asks other processes for
theirs: there they are as attention sees them, rotated and with what other ranks hold. A layer that
reads images both ways is measured both ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trinity.nn.attention import GatedAttention
from trinity.nn.linear_mixer import LinearMixer
from trinity.nn.scan_mixer import ReverseWay
from trinity.ops.common import accumulate_dtype, exact_dtypes, scratch_bmm
from trinity.ops.elementwise import rotary
from trinity.ops.image_attention import Sight
from trinity.ops.scan_inputs import runs_of

QUERIES = 64
"""Queries of a microbatch's first row, evenly spread over it."""
MAX_LOGITS = 1 << 25
"""Logits formed at a time; very long rows are sampled more thinly."""


class AttentionProbe:
    """Raises ``highest``, a scalar on the device, to the largest logit of sampled queries.

    A logit is what the softmax is given: the scaled product, less the decay where there is one. A
    query is held against every key that it sees. With ``num_parts`` ranks holding parts of a row,
    queries lie as they would in the whole row if the parts are multiples of their distance. Of
    rows of up to ``num_images`` images, what fills them up is left out.
    """

    def __init__(
        self,
        mixer: GatedAttention | LinearMixer,
        highest: Tensor,
        num_parts: int,
        num_images: int | None = None,
    ) -> None:
        self.mixer, self.highest, self.num_parts = mixer, highest, num_parts
        self.num_images = num_images
        self._rope: tuple[Tensor, Tensor] | None = None
        self._sight: Sight | None = None
        self._queries: dict[nn.Module, Tensor] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Measure the passes inside the ``with`` block."""
        with contextlib.ExitStack() as stack:
            if isinstance(self.mixer, GatedAttention):
                spies = [_Spy(self, self.mixer, "context", self.mixer.q_norm)]
            else:
                spies = [
                    _Spy(self, way, "attention_context", self.mixer.q_norm or way.q_conv)
                    for way in (self.mixer, self.mixer.reverse)
                    if way is not None
                ]
            for spy in spies:
                stack.enter_context(spy.installed())
            sources = dict.fromkeys(spy.source for spy in spies)
            for source in sources:
                stack.enter_context(source.register_forward_hook(self._take_queries))
            enter = self.mixer.register_forward_pre_hook(self._enter, with_kwargs=True)
            stack.enter_context(enter)
            stack.enter_context(self.mixer.register_forward_hook(self._leave))
            yield

    def _enter(self, _mixer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if isinstance(self.mixer, GatedAttention):
            self._rope, self._sight = args[1], options.get("sight")

    def _leave(self, *_: Any) -> None:
        self._rope = self._sight = None
        self._queries = {}

    def _take_queries(self, source: nn.Module, _args: Any, out: Tensor) -> None:
        if not is_replay():
            # The copy is made once it is known how many are wanted.
            self._queries[source] = out.detach()[0]

    @torch.no_grad()
    def measure(
        self,
        spy: _Spy,
        k_GSd: Tensor,
        ids_S: Tensor | None,
        window: int | None,
        decay_GS: Tensor | None,
    ) -> None:
        """Take the first row's keys into account, against the queries taken last."""
        q_SHd = self._queries[spy.source]
        if q_SHd.ndim == 2:
            q_SHd = q_SHd.unflatten(-1, (-1, self.mixer.head_dim))
        if spy.is_flipped:
            q_SHd = q_SHd.flip(0)
        num_here, num_heads = q_SHd.shape[:2]
        num_keys = k_GSd.shape[1]
        at_most = min(QUERIES, max(1, MAX_LOGITS // (num_heads * num_keys)))
        stride = stride_for(num_here * self.num_parts, at_most)
        wide = accumulate_dtype(k_GSd.dtype)
        with exact_dtypes(k_GSd):
            q_HNd = self._rotated(q_SHd[::stride].transpose(0, 1).to(wide), stride)
            q_GRd = q_HNd.reshape(len(k_GSd), -1, q_HNd.shape[-1])
            logits_GRS = scratch_bmm(q_GRd, k_GSd.detach().to(wide).mT)
            logits_GRS *= self.mixer.head_dim**-0.5
            logits = logits_GRS.unflatten(1, (-1, q_HNd.shape[1]))
            first = num_keys - num_here if self._sight is None else self._sight.first_query
            position_N = torch.arange(first, first + num_here, stride, device=k_GSd.device)
            if decay_GS is not None:
                sum_GS = decay_GS.detach().to(wide).cumsum(-1)
                logits += (sum_GS[:, position_N].unsqueeze(2) - sum_GS.unsqueeze(1)).unsqueeze(1)
            sees_NS = self._sees(position_N, num_keys, ids_S, window)
            highest = logits.masked_fill_(~sees_NS, -torch.inf).amax()
        self.highest.copy_(torch.maximum(self.highest, highest.double()))

    def _rotated(self, q_HNd: Tensor, stride: int) -> Tensor:
        """Every ``stride``-th query as the layer rotates them."""
        if self._rope is None or not (
            isinstance(self.mixer, GatedAttention) and self.mixer.rotates
        ):
            return q_HNd
        tables = (table[0] if table.ndim == 3 else table for table in self._rope)
        return rotary(q_HNd, *(table[::stride] for table in tables))

    def _sees(
        self, position_N: Tensor, num_keys: int, ids_S: Tensor | None, window: int | None
    ) -> Tensor:
        """True where a query of the first row sees a key."""
        if self._sight is not None:
            seen_BNS = self._sight.seen_from(position_N, window)
            whole = torch.ones(1, 1, num_keys, dtype=torch.bool, device=position_N.device)
            sees_NS = (whole if seen_BNS is None else seen_BNS)[0]
        else:
            position_S = torch.arange(num_keys, device=position_N.device)
            sees_NS = position_S <= position_N.unsqueeze(1)
            if window is not None:
                sees_NS &= position_S > position_N.unsqueeze(1) - window
            if ids_S is not None:
                run_S = runs_of(ids_S.unsqueeze(0))[0]
                sees_NS &= run_S == run_S[position_N].unsqueeze(1)
        if ids_S is not None and self.num_images is not None:
            sees_NS = sees_NS & (ids_S[position_N] < self.num_images).unsqueeze(1)
        return sees_NS


class _Spy:
    """In place of a way's access to other processes' keys, or of none."""

    def __init__(
        self,
        probe: AttentionProbe,
        way: GatedAttention | LinearMixer | ReverseWay,
        exchange: str,
        source: nn.Module | None,
    ) -> None:
        """``source`` is what the way's queries come out of last; None is the projection."""
        self.probe, self.way, self.exchange = probe, way, exchange
        self.source = source or probe.mixer.q_proj
        self.is_flipped = source is None and isinstance(way, ReverseWay)
        self.original = getattr(way, exchange)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen inside the ``with`` block."""
        setattr(self.way, self.exchange, self)
        try:
            yield
        finally:
            setattr(self.way, self.exchange, self.original)

    def __call__(self, k_BGSd: Tensor, v_BGSd: Tensor, *others: Any) -> tuple[Any, ...]:
        if isinstance(self.way, GatedAttention):
            return self._plain(k_BGSd, v_BGSd, *others)
        return self._decaying(k_BGSd, v_BGSd, *others)

    def _plain(
        self, k_BGSd: Tensor, v_BGSd: Tensor, ids_BS: Tensor | None, window: int | None
    ) -> tuple[Any, ...]:
        if self.original is not None:
            k_BGSd, v_BGSd, ids_BS = self.original(k_BGSd, v_BGSd, ids_BS, window)
        if not is_replay():
            ids_S = None if ids_BS is None else ids_BS[0]
            self.probe.measure(self, k_BGSd[0], ids_S, window, None)
        return k_BGSd, v_BGSd, ids_BS

    def _decaying(
        self, k_BGSd: Tensor, v_BGSd: Tensor, decay_BGS: Tensor, ids_BS: Tensor | None
    ) -> tuple[Any, ...]:
        if self.original is not None:
            k_BGSd, v_BGSd, decay_BGS, ids_BS = self.original(k_BGSd, v_BGSd, decay_BGS, ids_BS)
        if not is_replay():
            ids_S = None if ids_BS is None else ids_BS[0]
            self.probe.measure(self, k_BGSd[0], ids_S, None, decay_BGS[0])
        return k_BGSd, v_BGSd, decay_BGS, ids_BS


def is_replay() -> bool:
    """Whether the forward that runs is a recomputation, which only happens inside a backward."""
    return torch._C._current_graph_task_id() >= 0


def stride_for(num_tokens: int, at_most: int) -> int:
    """The distance between samples that leaves ``at_most`` of ``num_tokens``."""
    return max(1, -(-num_tokens // at_most))
