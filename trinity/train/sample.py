"""Text out of a model: the sample at the end of a run, and ``trinity generate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trinity.ckpt.load import load
from trinity.core.errors import ConfigError
from trinity.data.build import Dataset
from trinity.data.tokenizer import Tokenizer
from trinity.models.generate import generate, stream_tokens
from trinity.models.lm import LanguageModel
from trinity.train.run import Run

SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_P = 0.95


def sample_text(run: Run, model: LanguageModel, max_new_tokens: int) -> str:
    """Continue ``train.sample_prompt`` with the run's model, which is whole on this process.

    Sampled, not greedy: a short run's most likely text repeats itself.
    """
    assert isinstance(run.dataset, Dataset)
    tokenizer = run.dataset.tokenizer
    prompt_BS = _encode(tokenizer, run.config.train.sample_prompt).to(run.device)
    tokens_BS = generate(
        model,
        prompt_BS,
        max_new_tokens=max_new_tokens,
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        eos_id=tokenizer.eos_id,
        seed=run.config.seed,
    )
    return tokenizer.decode(tokens_BS[0].tolist())


def continue_text(
    path: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """Yield the prompt, then pieces of the continuation as they are decided."""
    model, tokenizer = load(path)
    if not prompt:
        raise ConfigError("--prompt is empty; give at least one character")
    yield prompt
    produced: list[int] = []
    shown = ""
    for token in stream_tokens(
        model,
        _encode(tokenizer, prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=tokenizer.eos_id,
        seed=seed,
    ):
        produced.append(int(token))
        text = tokenizer.decode(produced)
        # A character may span tokens: hold back what does not decode yet.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text


def _encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """One row of token ids, beginning-of-text included."""
    return torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]], dtype=torch.int64)
