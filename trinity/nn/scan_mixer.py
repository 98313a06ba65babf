"""What linear-time mixers share: convolutions and scans that begin before the row does.

A text is scanned from its first token to its last. Rows of images are also scanned from the last
to the first, by the same function with parameters of its own, and the two are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from trinity.nn.conv import ShortConv
from trinity.nn.rates import Rates, RateValues
from trinity.ops.scan import final_state, scan


class ScanCache(Protocol):
    """Where a layer keeps what it must know of the tokens it has already seen."""

    state: Tensor | None

    def rows_before(self, name: str, x_BSC: Tensor, count: int) -> Tensor:
        """The ``count`` rows of the stream ``name`` before ``x_BSC``, whose last it remembers."""
        ...


class ScanContext(Protocol):
    """Brings what earlier parts of the rows come to on other processes."""

    def own_ids(self, document_ids_BS: Tensor | None) -> Tensor | None:
        """Ids of this part, given those of the whole rows."""
        ...

    def rows_before(self, x_BSC: Tensor, count: int, document_ids_BS: Tensor | None) -> Tensor:
        """The ``count`` rows before this part; zeros where they are of another document."""
        ...

    def initial_state(
        self, state: Tensor, log_decay_BSU: Tensor, document_ids_BS: Tensor | None
    ) -> Tensor:
        """The state before this part, given what each part by itself comes to."""
        ...


class DecayingContext(Protocol):
    """Brings the tokens that earlier parts of the rows hold on other processes."""

    def __call__(
        self,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        log_decay_BGS: Tensor,
        document_ids_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All keys, values, log decays and ids up to the end of this part."""
        ...


class ScanWay(nn.Module):
    """The parameters of one pass over the rows, and how it learns what lies before them.

    For the reverse pass "before" is said of flipped rows.
    """

    q_conv: ShortConv | None
    k_conv: ShortConv | None
    v_conv: ShortConv | None
    rates: Rates

    def __init__(self) -> None:
        super().__init__()
        self.context: ScanContext | None = None
        self.attention_context: DecayingContext | None = None

    def take(self, parts: Mapping[str, nn.Module | None]) -> None:
        """Own these modules under their names."""
        for name, part in parts.items():
            setattr(self, name, part)

    def convolve(
        self,
        name: str,
        x_BSC: Tensor,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """Apply the convolution ``name``, where there is one."""
        conv = getattr(self, name)
        if not isinstance(conv, ShortConv):
            return x_BSC
        before_BwC = None
        if cache is not None:
            before_BwC = cache.rows_before(name, x_BSC, conv.width - 1)
        elif self.context is not None:
            before_BwC = self.context.rows_before(x_BSC, conv.width - 1, document_ids_BS)
        return conv(x_BSC, self.own_ids(document_ids_BS), before_BwC)

    def own_ids(self, document_ids_BS: Tensor | None) -> Tensor | None:
        """Document ids of the tokens that are here."""
        return document_ids_BS if self.context is None else self.context.own_ids(document_ids_BS)


class ReverseWay(ScanWay):
    """The pass from the last token to the first.

    ``scale`` is its weight, per head of the output. It starts at zero, so that a layer with the
    parameters of a language model's computes what that did.
    """

    def __init__(self, num_heads: int, parts: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(num_heads))
        self.take(parts)


class ScanMixer(ScanWay):
    """A mixer that convolves and scans; its past is in a cache, on another process, or nowhere.

    It is itself the way forward; ``reverse`` is None for texts.
    """

    reverse: ReverseWay | None
    head_dim: int

    def __init__(self, *, power: int, normalize: bool, scale: float | None) -> None:
        super().__init__()
        self.power, self.normalize, self.scale = power, normalize, scale
        self.backend = "auto"
        self.reverse = None

    def scan_rows(
        self,
        x_BSD: Tensor,
        streams: tuple[Tensor, Tensor, Tensor],
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """What the ways there are come to, (B, S, heads, e).

        ``streams`` are q, k and v of all heads, (B, S, channels) each, as projected from ``x_BSD``.
        """
        num_heads = streams[2].shape[-1] // self.head_dim
        rates = self.rates(x_BSD, num_heads)
        out_BSHe = self.scan_way(self, streams, rates, document_ids_BS, cache)
        if self.reverse is None:
            return out_BSHe
        assert cache is None, "what comes after a token must be there when it is read"
        # Projections see each token alone: only their results need flipping.
        log_decay_BSU, dt_BSU = self.reverse.rates(x_BSD, num_heads)
        q_BSC, k_BSC, v_BSC = streams
        back_BSHe = self.scan_way(
            self.reverse,
            (q_BSC.flip(1), k_BSC.flip(1), v_BSC.flip(1)),
            RateValues(log_decay_BSU.flip(1), None if dt_BSU is None else dt_BSU.flip(1)),
            None if document_ids_BS is None else document_ids_BS.flip(1),
            None,
        ).flip(1)
        return out_BSHe + (back_BSHe * self.reverse.scale.unsqueeze(-1)).to(out_BSHe.dtype)

    def scan_way(
        self,
        way: ScanWay,
        streams: tuple[Tensor, Tensor, Tensor],
        rates: RateValues,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """One pass, in the order in which the tokens are given."""
        raise NotImplementedError

    def mix(
        self,
        way: ScanWay,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSUe: Tensor,
        log_decay_BSU: Tensor,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """The scan, (B, S, heads, e)."""
        options = {"power": self.power, "normalize": self.normalize, "scale": self.scale}
        own_ids_BS = way.own_ids(document_ids_BS)
        initial, backend = None, self.backend
        if cache is not None:
            initial = cache.state
            if q_BSHd.shape[1] == 1 and backend == "auto":
                backend = "recurrent"
        elif way.context is not None:
            here = final_state(k_BSGd, v_BSUe, log_decay_BSU, document_ids_BS=own_ids_BS, **options)
            initial = way.context.initial_state(here, log_decay_BSU, document_ids_BS)
        out = scan(
            q_BSHd,
            k_BSGd,
            v_BSUe,
            log_decay_BSU,
            document_ids_BS=own_ids_BS,
            initial_state=initial,
            return_state=cache is not None,
            backend=backend,
            **options,
        )
        if cache is not None:
            cache.state = out.state
        return out.out_BSHe
