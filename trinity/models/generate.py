"""Generation with cached keys and values: a ring for local layers, everything for global ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.models.lm import LanguageModel
from trinity.ops.attention import causal_attention
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
        num_new = k_BGSd.shape[2]
        self._reserve(k_BGSd, v_BGSd)
        assert self._keys is not None
        assert self._values is not None
        end = self.num_tokens + num_new
        self._keys[:, :, self.num_tokens : end] = k_BGSd
        self._values[:, :, self.num_tokens : end] = v_BGSd
        past = self.num_tokens
        self.num_tokens = end
        if past == 0:
            return causal_attention(q_BHSd, k_BGSd, v_BGSd, window=None, document_ids_BS=None)
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]
        return _attend_with_past(q_BHSd, keys, values, window=None)

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


def make_caches(model: LanguageModel) -> list[FullCache | WindowCache]:
    """An empty cache for every layer of ``model``."""
    return [
        WindowCache(model.config.sliding_window) if kind == "sliding_attention" else FullCache()
        for kind in model.config.layer_types
    ]


@torch.inference_mode()
def stream_tokens(
    model: LanguageModel,
    prompt_BS: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, until all rows have ended.

    ``temperature`` 0 is greedy. ``top_k`` keeps the k likeliest tokens, ``top_p`` the smallest set
    with that much probability. A row that has produced ``eos_id`` goes on with it. Raises
    ConfigError, when the first token is asked for, for a prompt that is empty or not in the
    vocabulary, and for bad settings.
    """
    _check_prompt(prompt_BS, model.config.vocab_size)
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator(device=prompt_BS.device).manual_seed(seed)
    caches = make_caches(model)
    assert model.lm_head is not None
    tokens_BS, position = prompt_BS, 0
    ended_B = torch.zeros(len(prompt_BS), dtype=torch.bool, device=prompt_BS.device)
    for _ in range(max_new_tokens):
        out = model.hidden(tokens_BS, caches=caches, first_position=position)
        position += tokens_BS.shape[1]
        logits_BV = model.lm_head(out.hidden_BSD[:, -1]).float()
        next_B = _choose(logits_BV, temperature, top_k, top_p, generator)
        if eos_id is not None:
            next_B = torch.where(ended_B, eos_id, next_B)
            ended_B |= next_B == eos_id
        yield next_B
        if bool(ended_B.all()):
            return
        tokens_BS = next_B[:, None]


def generate(
    model: LanguageModel,
    prompt_BS: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Prompt and continuation, (B, S + new); see :func:`stream_tokens`."""
    new = stream_tokens(
        model,
        prompt_BS,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        seed=seed,
    )
    return torch.cat([prompt_BS, *(token_B[:, None] for token_B in new)], dim=1)


def _check_prompt(prompt_BS: Tensor, vocab_size: int) -> None:
    if prompt_BS.ndim != 2:
        raise ConfigError(
            f"the prompt has shape {tuple(prompt_BS.shape)}, not (rows, tokens); a single row is "
            "prompt[None]"
        )
    if prompt_BS.numel() == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    for token in (int(prompt_BS.min()), int(prompt_BS.max())):
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"the prompt holds token {token}, the model has 0..{vocab_size - 1}; is the "
                "tokenizer another model's?"
            )


def _check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is negative; give 0 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"temperature={temperature} must be finite and not negative; 0 is greedy, 1 is as "
            "trained"
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} must be in (0, 1]")


def _choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    sorted_BV, order_BV = (logits_BV / temperature).sort(-1, descending=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = float("-inf")
    probabilities_BV = torch.softmax(sorted_BV, -1)
    if top_p is not None:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0.0)
    drawn_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return order_BV.gather(-1, drawn_B1)[:, 0]


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
