"""The largest attention logit of a layer, seen from outside while a sampled step runs.

Queries are taken where the layer's norm leaves them, keys where the layer asks other processes for
theirs: there they are as attention sees them, rotated and with what earlier ranks hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trinity.nn.attention import GatedAttention
from trinity.nn.linear_mixer import LinearMixer
from trinity.ops.common import accumulate_dtype, exact_dtypes, scratch_bmm
from trinity.ops.elementwise import rotary
from trinity.ops.scan_inputs import runs_of

QUERIES = 64
"""Queries of a microbatch's first row, evenly spread over it."""
MAX_LOGITS = 1 << 25
"""Logits formed at a time; very long rows are sampled more thinly."""


class AttentionProbe:
    """Raises ``highest``, a scalar on the device, to the largest logit of sampled queries.

    A logit is what the softmax is given: the scaled product, less the decay where there is one. A
    query is held against every key that it sees. With ``num_parts`` ranks holding parts of a row,
    queries lie as they would in the whole row if the parts are multiples of their distance.
    """

    def __init__(
        self, mixer: GatedAttention | LinearMixer, highest: Tensor, num_parts: int
    ) -> None:
        self.mixer, self.highest, self.num_parts = mixer, highest, num_parts
        self._cos_sin: tuple[Tensor, Tensor] | None = None
        self._q_SHd: Tensor | None = None
        if isinstance(mixer, LinearMixer):
            self._exchange = "attention_context"
            self._query_source = mixer.q_norm or mixer.q_conv or mixer.q_proj
        else:
            self._exchange = "context"
            self._query_source = mixer.q_norm

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Measure the passes inside the ``with`` block."""
        original = getattr(self.mixer, self._exchange)
        setattr(self.mixer, self._exchange, _Spy(self, original))
        try:
            with (
                self.mixer.register_forward_pre_hook(self._enter),
                self._query_source.register_forward_hook(self._take_queries),
            ):
                yield
        finally:
            setattr(self.mixer, self._exchange, original)

    def _enter(self, _mixer: nn.Module, args: tuple[Any, ...]) -> None:
        self._cos_sin = args[1] if isinstance(self.mixer, GatedAttention) else None

    def _take_queries(self, _module: nn.Module, _args: Any, out: Tensor) -> None:
        if not is_replay():
            row = out.detach()[0]  # the copy is made once it is known how many are wanted
            self._q_SHd = row if row.ndim == 3 else row.unflatten(-1, (-1, self.mixer.head_dim))

    @torch.no_grad()
    def measure(
        self, k_GSd: Tensor, ids_S: Tensor | None, window: int | None, decay_GS: Tensor | None
    ) -> None:
        """Take the first row's keys into account, against the queries taken last."""
        q_SHd, self._q_SHd = self._q_SHd, None
        assert q_SHd is not None
        num_here, num_heads = q_SHd.shape[:2]
        num_keys = k_GSd.shape[1]
        at_most = min(QUERIES, max(1, MAX_LOGITS // (num_heads * num_keys)))
        stride = stride_for(num_here * self.num_parts, at_most)
        wide = accumulate_dtype(k_GSd.dtype)
        with exact_dtypes(k_GSd):
            q_HNd = q_SHd[::stride].transpose(0, 1).to(wide)
            if window is not None and self._cos_sin is not None:
                q_HNd = rotary(q_HNd, *(table[::stride] for table in self._cos_sin))
            q_GRd = q_HNd.reshape(len(k_GSd), -1, q_HNd.shape[-1])
            logits_GRS = scratch_bmm(q_GRd, k_GSd.detach().to(wide).mT)
            logits_GRS *= self.mixer.head_dim**-0.5
            logits = logits_GRS.unflatten(1, (-1, q_HNd.shape[1]))
            position_S = torch.arange(num_keys, device=k_GSd.device)
            position_N = position_S[num_keys - num_here :: stride]
            if decay_GS is not None:
                sum_GS = decay_GS.detach().to(wide).cumsum(-1)
                logits += (sum_GS[:, position_N].unsqueeze(2) - sum_GS.unsqueeze(1)).unsqueeze(1)
            sees_NS = position_S <= position_N.unsqueeze(1)
            if window is not None:
                sees_NS &= position_S > position_N.unsqueeze(1) - window
            if ids_S is not None:
                run_S = runs_of(ids_S.unsqueeze(0))[0]
                sees_NS &= run_S == run_S[position_N].unsqueeze(1)
            highest = logits.masked_fill_(~sees_NS, -torch.inf).amax()
        self.highest.copy_(torch.maximum(self.highest, highest.double()))


class _Spy:
    """In place of a mixer's way to other processes' keys, or of none."""

    def __init__(self, probe: AttentionProbe, original: Any) -> None:
        self.probe, self.original = probe, original

    def __call__(self, k_BGSd: Tensor, v_BGSd: Tensor, *others: Any) -> tuple[Any, ...]:
        if isinstance(self.probe.mixer, GatedAttention):
            return self._plain(k_BGSd, v_BGSd, *others)
        return self._decaying(k_BGSd, v_BGSd, *others)

    def _plain(
        self, k_BGSd: Tensor, v_BGSd: Tensor, ids_BS: Tensor | None, window: int | None
    ) -> tuple[Any, ...]:
        if self.original is not None:
            k_BGSd, v_BGSd, ids_BS = self.original(k_BGSd, v_BGSd, ids_BS, window)
        if not is_replay():
            self.probe.measure(k_BGSd[0], None if ids_BS is None else ids_BS[0], window, None)
        return k_BGSd, v_BGSd, ids_BS

    def _decaying(
        self, k_BGSd: Tensor, v_BGSd: Tensor, decay_BGS: Tensor, ids_BS: Tensor | None
    ) -> tuple[Any, ...]:
        if self.original is not None:
            k_BGSd, v_BGSd, decay_BGS, ids_BS = self.original(k_BGSd, v_BGSd, decay_BGS, ids_BS)
        if not is_replay():
            ids_S = None if ids_BS is None else ids_BS[0]
            self.probe.measure(k_BGSd[0], ids_S, None, decay_BGS[0])
        return k_BGSd, v_BGSd, decay_BGS, ids_BS


def is_replay() -> bool:
    """Whether the forward that runs is a recomputation, which only happens inside a backward."""
    return torch._C._current_graph_task_id() >= 0


def stride_for(num_tokens: int, at_most: int) -> int:
    """The distance between samples that leaves ``at_most`` of ``num_tokens``."""
    return max(1, -(-num_tokens // at_most))
