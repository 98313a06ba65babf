"""What a layer remembers while text is generated.

Keys and values of the last tokens in a ring for sliding-window layers, of all tokens for global
ones; a state of fixed size and a few rows for linear-time layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.model_config import PRESETS
from trinity.models.lm import LanguageModel
from trinity.ops.attention import causal_attention, forgetting_attention
from trinity.ops.common import not_traced

GROWTH_TOKENS = 256
"""A full cache grows by at least this much, so that decoding rarely copies it."""


class FullCache:
    """Keys and values of every token so far, for layers that see all of them."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.num_tokens = 0

    @not_traced  # its counter differs at every call: a compiled block would be compiled anew
    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        """Append and attend; the S new tokens see all earlier ones and each other causally."""
        past = self.num_tokens
        keys, values = self.append(k_BGSd, v_BGSd)
        if past == 0:
            return causal_attention(q_BHSd, k_BGSd, v_BGSd, window=None, document_ids_BS=None)
        return _attend_with_past(q_BHSd, keys, values, window=None)

    def append(self, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new ones included."""
        self._reserve(k_BGSd, v_BGSd)
        assert self._keys is not None
        assert self._values is not None
        end = self.num_tokens + k_BGSd.shape[2]
        self._keys[:, :, self.num_tokens : end] = k_BGSd
        self._values[:, :, self.num_tokens : end] = v_BGSd
        self.num_tokens = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _reserve(self, k_BGSd: Tensor, v_BGSd: Tensor) -> None:
        needed = self.num_tokens + k_BGSd.shape[2]
        capacity = 0 if self._keys is None else self._keys.shape[2]
        if needed <= capacity:
            return
        grown = needed + max(GROWTH_TOKENS, capacity // 2)
        self._keys = _grown(self._keys, k_BGSd, grown, self.num_tokens)
        self._values = _grown(self._values, v_BGSd, grown, self.num_tokens)


class WindowCache:
    """The last ``window`` keys and values, in a ring: memory does not grow with the text."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.num_tokens = 0

    @not_traced  # its counter differs at every call: a compiled block would be compiled anew
    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        """Append and attend; each new token sees ``window`` keys, itself included."""
        num_past = min(self.num_tokens, self.window)
        if num_past == 0:
            out_BHSd = causal_attention(
                q_BHSd, k_BGSd, v_BGSd, window=self.window, document_ids_BS=None
            )
        elif k_BGSd.shape[2] == 1:
            self._append(k_BGSd, v_BGSd)
            assert self._keys is not None
            assert self._values is not None
            held = min(self.num_tokens, self.window)
            # Softmax does not care in which order the ring holds its entries.
            keys, values = self._keys[:, :, :held], self._values[:, :, :held]
            return _attend_with_past(q_BHSd, keys, values, window=None)
        else:
            keys, values = (
                torch.cat((past, new), dim=2)
                for past, new in zip(self._in_order(num_past), (k_BGSd, v_BGSd), strict=True)
            )
            out_BHSd = _attend_with_past(q_BHSd, keys, values, window=self.window)
        self._append(k_BGSd, v_BGSd)
        return out_BHSd

    def _in_order(self, num_past: int) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        positions = torch.arange(
            self.num_tokens - num_past, self.num_tokens, device=self._keys.device
        )
        slots = positions % self.window
        return self._keys.index_select(2, slots), self._values.index_select(2, slots)

    def _append(self, k_BGSd: Tensor, v_BGSd: Tensor) -> None:
        if self._keys is None or self._values is None:
            shape = (*k_BGSd.shape[:2], self.window, k_BGSd.shape[3])
            self._keys, self._values = k_BGSd.new_zeros(shape), v_BGSd.new_zeros(shape)
        num_new = k_BGSd.shape[2]
        kept = min(num_new, self.window)
        positions = torch.arange(
            self.num_tokens + num_new - kept, self.num_tokens + num_new, device=k_BGSd.device
        )
        slots = positions % self.window
        self._keys.index_copy_(2, slots, k_BGSd[:, :, num_new - kept :])
        self._values.index_copy_(2, slots, v_BGSd[:, :, num_new - kept :])
        self.num_tokens += num_new


class StateCache:
    """A state, and the last inputs of each convolution: memory does not grow with the text."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self._rows: dict[str, Tensor] = {}

    @not_traced  # the first call differs from all others
    def rows_before(self, name: str, x_BSC: Tensor, count: int) -> Tensor:
        """The ``count`` rows before ``x_BSC``, zeros at the start; remembers its last ones."""
        before_BwC = self._rows.get(name)
        if before_BwC is None:
            before_BwC = x_BSC.new_zeros(x_BSC.shape[0], count, x_BSC.shape[2])
        both = torch.cat((before_BwC, x_BSC), dim=1)
        self._rows[name] = both[:, both.shape[1] - count :]
        return before_BwC


class ForgettingCache(StateCache):
    """Keys, values and decays of every token, for softmax attention that forgets."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens = FullCache()
        self._log_decay_BGS: Tensor | None = None

    @not_traced
    def attend(
        self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, log_decay_BGS: Tensor
    ) -> Tensor:
        """Append and attend; (B, H, S, d)."""
        if self._log_decay_BGS is not None:
            log_decay_BGS = torch.cat((self._log_decay_BGS, log_decay_BGS), dim=2)
        self._log_decay_BGS = log_decay_BGS
        keys, values = self._tokens.append(k_BGSd, v_BGSd)
        backend = "reference" if q_BHSd.shape[2] == 1 else "blocked"
        return forgetting_attention(
            q_BHSd, keys, values, log_decay_BGS, document_ids_BS=None, backend=backend
        )


LayerCache = FullCache | WindowCache | StateCache


def make_caches(model: LanguageModel) -> list[LayerCache]:
    """An empty cache for every layer of ``model``."""
    return [_make_cache(model, kind) for kind in model.config.layer_types]


def _make_cache(model: LanguageModel, layer_type: str) -> LayerCache:
    if layer_type == "sliding_attention":
        return WindowCache(model.config.sliding_window)
    if layer_type == "mamba2":
        return StateCache()
    if layer_type in PRESETS:
        is_attention = model.config.linear.options(layer_type).power == "exp"
        return ForgettingCache() if is_attention else StateCache()
    return FullCache()


def _attend_with_past(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, window: int | None) -> Tensor:
    """New queries against past and new keys; the last query stands at the last key."""
    num_queries, num_keys = q_BHSd.shape[2], k_BGSd.shape[2]
    mask = None
    if num_queries > 1:
        query = torch.arange(num_keys - num_queries, num_keys, device=q_BHSd.device)[:, None]
        key = torch.arange(num_keys, device=q_BHSd.device)[None, :]
        mask = key <= query
        if window is not None:
            mask &= query - key < window
    return F.scaled_dot_product_attention(
        q_BHSd, k_BGSd, v_BGSd, attn_mask=mask, enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1]
    )


def _grown(old: Tensor | None, like_BGSd: Tensor, capacity: int, num_tokens: int) -> Tensor:
    shape = (*like_BGSd.shape[:2], capacity, like_BGSd.shape[3])
    new = like_BGSd.new_empty(shape)
    if old is not None:
        new[:, :, :num_tokens] = old[:, :, :num_tokens]
    return new
