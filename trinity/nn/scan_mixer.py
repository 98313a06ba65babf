"""What linear-time mixers share: convolutions and scans that begin before the row does."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from trinity.nn.conv import ShortConv
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


class ScanMixer(nn.Module):
    """A mixer that convolves and scans; its past is in a cache, on another process, or nowhere."""

    def __init__(self, *, power: int, normalize: bool, scale: float | None) -> None:
        super().__init__()
        self.power, self.normalize, self.scale = power, normalize, scale
        self.backend = "auto"
        self.context: ScanContext | None = None

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

    def mix(
        self,
        q_BSHd: Tensor,
        k_BSGd: Tensor,
        v_BSUe: Tensor,
        log_decay_BSU: Tensor,
        document_ids_BS: Tensor | None,
        cache: ScanCache | None,
    ) -> Tensor:
        """The scan, (B, S, heads, e)."""
        options = {"power": self.power, "normalize": self.normalize, "scale": self.scale}
        own_ids_BS = self.own_ids(document_ids_BS)
        initial, backend = None, self.backend
        if cache is not None:
            initial = cache.state
            if q_BSHd.shape[1] == 1 and backend == "auto":
                backend = "recurrent"
        elif self.context is not None:
            here = final_state(k_BSGd, v_BSUe, log_decay_BSU, document_ids_BS=own_ids_BS, **options)
            initial = self.context.initial_state(here, log_decay_BSU, document_ids_BS)
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
