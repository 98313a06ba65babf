"""Cached decoding equals full recomputation, in and beyond the window."""

from __future__ import annotations

import pytest
import torch

from trinity.core.config import ModelConfig
from trinity.core.errors import ConfigError
from trinity.models.generate import WindowCache, generate, make_caches
from trinity.models.lm import LanguageModel

WINDOW = 6
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=4,
    num_dense_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    route_scale=2.0,
    sliding_window=WINDOW,
    global_attn_every_n_layers=2,
)


@pytest.fixture
def model() -> LanguageModel:
    model = LanguageModel.initialized(CONFIG, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    "chunks",
    [
        [1] * 23,
        [3] + [1] * 20,
        [WINDOW] + [1] * 17,
        [17] + [1] * 6,
        [5, 9, 1, 1, 7],
        [2, 1, 20],
        [23],
    ],
)
def test_cached_logits_equal_full_ones(model: LanguageModel, chunks: list[int]) -> None:
    """Prefills shorter, as long as and longer than the window, in pieces and token by token."""
    tokens_BS = torch.randint(0, 61, (2, 23))
    full_BSV = model(tokens_BS)
    caches, position, pieces = make_caches(model), 0, []
    for size in chunks:
        out = model.hidden(
            tokens_BS[:, position : position + size], caches=caches, first_position=position
        )
        pieces.append(model.lm_head(out.hidden_BSD))
        position += size
    # Rotary tables are fp32; everything else is fp64.
    torch.testing.assert_close(torch.cat(pieces, 1), full_BSV, rtol=0, atol=1e-6)


def test_a_local_cache_never_outgrows_its_window(model: LanguageModel) -> None:
    caches = make_caches(model)
    position = 0
    for size in (4, 30, *[1] * 10):
        model.hidden(torch.zeros(1, size, dtype=torch.int64), None, caches, position)
        position += size
    for cache, kind in zip(caches, CONFIG.layer_types, strict=True):
        assert cache.num_tokens == position
        assert cache._keys is not None
        if kind == "sliding_attention":
            assert isinstance(cache, WindowCache)
            assert cache._keys.shape[2] == WINDOW
        else:
            assert cache._keys.shape[2] >= position


def test_greedy_equals_repeated_full_forward(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (3, 4))
    expected_BS = prompt_BS
    for _ in range(20):
        next_B = model(expected_BS)[:, -1].argmax(-1)
        expected_BS = torch.cat([expected_BS, next_B[:, None]], 1)
    assert torch.equal(generate(model, prompt_BS, max_new_tokens=20), expected_BS)


def test_sampling_follows_its_seed_and_its_limits(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))

    def draw(**options: object) -> torch.Tensor:
        return generate(model, prompt_BS, max_new_tokens=12, **options)  # type: ignore[arg-type]

    greedy = draw()
    assert torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=1))
    assert not torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=2))
    assert torch.equal(draw(temperature=3.0, top_k=1), greedy)
    assert torch.equal(draw(temperature=3.0, top_p=1e-9), greedy)


def test_a_row_that_has_ended_stays_ended(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))
    greedy = generate(model, prompt_BS, max_new_tokens=12)
    eos = int(greedy[0, 7])
    ended = generate(model, prompt_BS, max_new_tokens=12, eos_id=eos)
    first = (ended[0, 4:] == eos).nonzero()[0, 0] + 4
    assert (ended[0, first:] == eos).all()
    assert torch.equal(ended[0, : first + 1], greedy[0, : first + 1])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([61], {}, "token 61"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ([1], {"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_bad_requests_are_named(
    model: LanguageModel, prompt: list[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(
            model,
            torch.tensor([prompt], dtype=torch.int64),
            max_new_tokens=1,
            **options,  # type: ignore[arg-type]
        )
