"""Attention that looks both ways: patches of images, packed several images to a row.

``image_attention`` is the one entrance. A :class:`Sight` says who sees whom; all layers of a
forward pass share it. The backends compute the same function:

``sdpa``       PyTorch's fused attention, with an S x S mask where not everybody sees everybody.
``flex``       PyTorch's flex attention, which skips blocks of 128 x 128 tokens that nobody sees.
               For GPUs; it has not run on one yet, so it must be asked for by name.
``reference``  the definition, with every score formed, in fp32 at least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.common import accumulate_dtype, compute_dtype, exact_dtypes, not_traced
from trinity.ops.scan_inputs import runs_of


class Sight:
    """Who sees whom in rows of packed images.

    A token sees those of its own document, which is a run of equal ids: an image, or the padding
    of a row. In a local layer of window ``w`` it sees of these only the ones whose row and whose
    column are both less than ``w / 2`` from its own and that are in the same frame. Among base
    tokens, which stand on whole numbers, that is a square of w x w tokens for odd ``w``, and for
    even ``w`` the same as for ``w - 1``: no even square has a token in its middle.

    Not a tuple, so that whatever casts or rebuilds the inputs of modules leaves it alone: masks are
    made once per window, and coordinates stay exact.
    """

    def __init__(
        self,
        coordinates_BSA: Tensor,
        document_ids_BS: Tensor | None = None,
        *,
        first_query: int = 0,
        num_queries: int | None = None,
    ) -> None:
        """Describe whole rows, also where this process has the queries of a part of them.

        Args:
            coordinates_BSA: where the keys' tokens stand, in base tokens, (row, column) or (frame,
                row, column); float32, (B or 1, S, 2 or 3). Larger patches stand between base
                tokens.
            document_ids_BS: integers, (B or 1, S), or None where each row is one image.
            first_query: position in the row of the first query that is here.
            num_queries: how many are here; None is all from there on.
        """
        self.coordinates_BSA = coordinates_BSA
        self.document_ids_BS = document_ids_BS
        num_keys = coordinates_BSA.shape[1]
        self.num_queries = num_keys - first_query if num_queries is None else num_queries
        self.first_query = first_query
        assert 0 <= first_query <= first_query + self.num_queries <= num_keys
        self._run_BS = None if document_ids_BS is None else runs_of(document_ids_BS)
        self._made: dict[tuple[str, int | None], Any] = {}

    @not_traced
    def mask(self, window: int | None) -> Tensor | None:
        """True where the query sees the key, (B or 1, 1, queries, S); None if all see all.

        Every query sees at least itself. ``window`` is a side in base tokens or None.
        """
        return self._once("mask", window, self._make_mask)

    @not_traced
    def block_mask(self, window: int | None) -> Any:
        """The same for flex attention."""
        return self._once("blocks", window, self._make_block_mask)

    def _once(self, kind: str, window: int | None, make: Callable[[int | None], Any]) -> Any:
        if (kind, window) not in self._made:
            self._made[kind, window] = make(window)
        return self._made[kind, window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        own = slice(self.first_query, self.first_query + self.num_queries)
        sees_BQS = self.seen_from(own, window)
        return None if sees_BQS is None else sees_BQS.unsqueeze(1)

    def seen_from(self, queries: slice | Tensor, window: int | None) -> Tensor | None:
        """The same for some queries, here or not, by their positions in the rows: (B or 1, Q, S)"""
        sees_BQS = None
        for field_BS, reach in self._fields(window):
            of_query_BQ1, of_key_B1S = field_BS[:, queries, None], field_BS[:, None, :]
            close_BQS = _is_close(of_query_BQ1, of_key_B1S, reach)
            sees_BQS = close_BQS if sees_BQS is None else sees_BQS & close_BQS
        return sees_BQS

    def _make_block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        fields = self._fields(window)
        if not fields:
            return None

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            close = query >= 0
            for field_BS, reach in fields:
                at = row if field_BS.shape[0] > 1 else torch.zeros_like(row)
                of_query = field_BS[at, query + self.first_query]
                close = close & _is_close(of_query, field_BS[at, key], reach)
            return close

        device, num_keys = self.coordinates_BSA.device, self.coordinates_BSA.shape[1]
        batch = max(field_BS.shape[0] for field_BS, _ in fields)
        return create_block_mask(sees, batch, None, self.num_queries, num_keys, device=device)

    def _fields(self, window: int | None) -> list[tuple[Tensor, int | None]]:
        """What decides, per token, and the window that it must be within; None: must be equal."""
        fields: list[tuple[Tensor, int | None]] = []
        if self._run_BS is not None:
            fields.append((self._run_BS, None))
        if window is not None:
            *frames, rows, columns = self.coordinates_BSA.unbind(-1)
            fields += [(field_BS, None) for field_BS in frames]
            fields += [(rows, window), (columns, window)]
        return fields


def _is_close(of_query: Tensor, of_key: Tensor, window: int | None) -> Tensor:
    if window is None:
        return of_query == of_key
    return (of_query - of_key).abs() < window / 2


def image_attention(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    sight: Sight,
    *,
    window: int | None,
    key_bias_BS: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over the keys each token sees; (B, H, queries, d).

    Args:
        q_BHSd: queries; H is a multiple of G, query head h uses key head h // (H / G).
        k_BGSd: keys of the whole rows.
        v_BGSd: values of the whole rows.
        sight: who sees whom.
        window: side of what a token sees in a local layer, in base tokens; None for a global one.
        key_bias_BS: added to all scores of a key, (B or 1, S); a constant, without a gradient.
        backend: a key of ``BACKENDS``, or "auto" for the one that suits this device.

    Raises:
        ConfigError: unknown backend, or one that cannot do what is asked.
    """
    if window is not None and window < 1:
        raise ConfigError(f"window {window} must be at least 1 token a side, the token itself")
    dtype = compute_dtype(q_BHSd)
    q_BHSd, k_BGSd, v_BGSd = q_BHSd.to(dtype), k_BGSd.to(dtype), v_BGSd.to(dtype)
    if key_bias_BS is not None:
        # Kept wide: the logarithm of a size would lose digits in bf16.
        key_bias_BS = key_bias_BS.detach().to(accumulate_dtype(dtype))
    if backend == "auto":
        backend = "sdpa"
    if backend not in BACKENDS:
        raise ConfigError(
            f"image attention backend {backend!r} does not exist; use one of auto, "
            f"{', '.join(BACKENDS)}"
        )
    with exact_dtypes(q_BHSd):
        return BACKENDS[backend](q_BHSd, k_BGSd, v_BGSd, sight, window, key_bias_BS)


def _reference(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    sight: Sight,
    window: int | None,
    key_bias_BS: Tensor | None,
) -> Tensor:
    dtype = q_BHSd.dtype
    wide = accumulate_dtype(dtype)
    k_BHSd, v_BHSd = (x.to(wide) for x in _repeated(q_BHSd, k_BGSd, v_BGSd))
    scores_BHQS = q_BHSd.to(wide) @ k_BHSd.mT * q_BHSd.shape[-1] ** -0.5
    if key_bias_BS is not None:
        scores_BHQS = scores_BHQS + key_bias_BS[:, None, None]
    mask = sight.mask(window)
    if mask is not None:
        scores_BHQS = scores_BHQS.masked_fill(~mask, float("-inf"))
    return (scores_BHQS.softmax(-1) @ v_BHSd).to(dtype)


def _sdpa(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    sight: Sight,
    window: int | None,
    key_bias_BS: Tensor | None,
) -> Tensor:
    mask = sight.mask(window)
    if key_bias_BS is not None:
        bias = key_bias_BS[:, None, None]
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    # No fused kernel of a GPU takes both a mask and grouped heads; a CPU's expands more slowly.
    if mask is not None or q_BHSd.device.type == "cpu":
        k_BGSd, v_BGSd = _repeated(q_BHSd, k_BGSd, v_BGSd)
    is_grouped = q_BHSd.shape[1] != k_BGSd.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSd, k_BGSd, v_BGSd, attn_mask=mask, enable_gqa=is_grouped
    )


@not_traced
def _flex(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    sight: Sight,
    window: int | None,
    key_bias_BS: Tensor | None,
) -> Tensor:
    def biased(score: Tensor, row: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        assert key_bias_BS is not None
        at = row if key_bias_BS.shape[0] > 1 else torch.zeros_like(row)
        return score + key_bias_BS[at, key]

    if q_BHSd.device.type == "cpu" and q_BHSd.requires_grad:
        raise ConfigError(
            'image attention backend "flex" has no backward on a CPU; use "auto" or "sdpa" there'
        )
    attend = _flex_attention(q_BHSd.device.type != "cpu")
    return attend(
        q_BHSd,
        k_BGSd,
        v_BGSd,
        score_mod=None if key_bias_BS is None else biased,
        block_mask=sight.block_mask(window),
        enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1],
    )


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    """Not compiled it forms every score, which only tests want."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _repeated(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, one head per query head."""
    groups = q_BHSd.shape[1] // k_BGSd.shape[1]
    if groups == 1:
        return k_BGSd, v_BGSd
    return k_BGSd.repeat_interleave(groups, dim=1), v_BGSd.repeat_interleave(groups, dim=1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Sight, int | None, Tensor | None], Tensor]]
BACKENDS = {"sdpa": _sdpa, "flex": _flex, "reference": _reference}
