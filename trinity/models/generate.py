"""Generation, token by token, with what each layer remembers of the tokens before."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.models.caches import make_caches
from trinity.models.lm import LanguageModel


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
