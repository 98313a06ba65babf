"""Cached decoding equals full recomputation, in and beyond the window."""

from __future__ import annotations

import math

import pytest
import torch

from trinity.core.config import ModelConfig
from trinity.core.errors import ConfigError
from trinity.models.caches import StateCache, WindowCache, make_caches
from trinity.models.generate import _choose, generate, stream_tokens
from trinity.models.lm import LanguageModel
from trinity.parallel.recompute import apply_recompute

WINDOW = 4
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


HYBRID = ModelConfig.model_validate(
    CONFIG.model_dump()
    | {
        "num_hidden_layers": 6,
        "num_dense_layers": 0,
        "layer_types": (),
        "ffn_types": (),
        "layer_pattern": "ME2-WEX-SE*E",
        "mamba2": {"head_dim": 8, "state_dim": 6, "num_groups": 2},
        "linear": {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2},
    }
)


@pytest.fixture(params=[CONFIG, HYBRID], ids=["afmoe", "hybrid"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = LanguageModel.initialized(request.param, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "chunks",
    [
        [1] * 23,
        [3] + [1] * 20,
        [WINDOW] + [1] * 19,
        [WINDOW + 1] + [1] * 18,
        [17] + [1] * 6,
        [5, 9, 1, 1, 7],
        [2, 1, 20],
        [WINDOW, WINDOW, 2, WINDOW, 9],
        [23],
    ],
)
def test_cached_logits_equal_full_ones(
    model: LanguageModel, chunks: list[int], dtype: torch.dtype, atol: float
) -> None:
    """Prefills shorter, as long as and longer than the window, in pieces and token by token."""
    model.to(dtype)
    tokens_BS = torch.randint(0, 61, (2, 23))
    full_BSV = model(tokens_BS)
    caches, position, pieces = make_caches(model), 0, []
    for size in chunks:
        out = model.hidden(
            tokens_BS[:, position : position + size], caches=caches, first_position=position
        )
        pieces.append(model.lm_head(out.hidden_BSD))
        position += size
    torch.testing.assert_close(torch.cat(pieces, 1), full_BSV, rtol=0, atol=atol)


def test_a_full_cache_keeps_everything_while_it_grows(model: LanguageModel) -> None:
    """Beyond the first allocation, where old entries move to a larger one."""
    tokens_BS = torch.randint(0, 61, (1, 700))
    full_BSV = model(tokens_BS)
    caches, position, pieces = make_caches(model), 0, []
    for size in (3, 250, 1, 1, 1, 5, 1, 300, *[1] * 138):
        out = model.hidden(
            tokens_BS[:, position : position + size], caches=caches, first_position=position
        )
        pieces.append(model.lm_head(out.hidden_BSD))
        position += size
    torch.testing.assert_close(torch.cat(pieces, 1), full_BSV, rtol=0, atol=1e-12)


def test_a_local_cache_never_outgrows_its_window(model: LanguageModel) -> None:
    caches = make_caches(model)
    position = 0
    for size in (4, 30, *[1] * 10):
        model.hidden(torch.zeros(1, size, dtype=torch.int64), None, caches, position)
        position += size
    for cache, kind in zip(caches, model.config.layer_types, strict=True):
        if isinstance(cache, StateCache):
            continue
        assert cache.num_tokens == position
        assert cache._keys is not None
        if kind == "sliding_attention":
            assert isinstance(cache, WindowCache)
            assert cache._values is not None
            assert cache._keys.shape[2] == cache._values.shape[2] == WINDOW
        else:
            assert cache._keys.shape[2] >= position


def test_greedy_equals_repeated_full_forward(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (3, 4))
    expected_BS = prompt_BS
    for _ in range(20):
        next_B = model(expected_BS)[:, -1].argmax(-1)
        expected_BS = torch.cat([expected_BS, next_B[:, None]], 1)
    assert torch.equal(generate(model, prompt_BS, max_new_tokens=20), expected_BS)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_model_set_up_for_training_generates_the_same(model: LanguageModel, mode: str) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))
    expected_BS = generate(model.eval(), prompt_BS, max_new_tokens=12)
    apply_recompute(model.backbone.layers.values(), mode)  # type: ignore[arg-type]
    assert torch.equal(generate(model.train(), prompt_BS, max_new_tokens=12), expected_BS)


def test_a_stream_yields_what_generate_returns(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))
    tokens = []
    for token_B in stream_tokens(model, prompt_BS, max_new_tokens=9):
        assert token_B.shape == (2,)
        assert token_B.is_inference()
        assert not torch.is_inference_mode_enabled()  # between tokens the caller is as before
        tokens.append(token_B)
    assert torch.equal(torch.stack(tokens, 1), generate(model, prompt_BS, max_new_tokens=9)[:, 4:])


def test_sampling_follows_its_seed_and_its_limits(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))

    def draw(**options: object) -> torch.Tensor:
        return generate(model, prompt_BS, max_new_tokens=12, **options)  # type: ignore[arg-type]

    greedy = draw()
    assert torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=1))
    assert not torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=2))
    assert torch.equal(draw(temperature=3.0, top_k=1), greedy)
    assert torch.equal(draw(temperature=3.0, top_p=1e-9), greedy)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        # The smallest set that holds the mass: 0.4 is too little, 0.4 + 0.3 is enough.
        ({"top_p": 0.5}, [0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7]),
        ({"top_p": 0.75}, [0.0, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        # The mass is that of what top_k has left: 4/7 of two tokens.
        ({"top_k": 2, "top_p": 0.55}, [0.0, 1.0, 0.0, 0.0]),
        # Half the temperature squares the odds.
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ],
)
def test_drawn_tokens_follow_their_probabilities(
    options: dict[str, float], kept: list[float]
) -> None:
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    logits_BV = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(20_000, -1)
    drawn_B = _choose(
        logits_BV,
        generator=torch.Generator().manual_seed(0),
        **settings,  # type: ignore[arg-type]
    )
    shares = torch.bincount(drawn_B, minlength=4) / len(drawn_B)
    torch.testing.assert_close(shares, torch.tensor(kept), rtol=0, atol=0.015)
    assert torch.equal(shares == 0, torch.tensor(kept) == 0)


def test_generation_stops_when_every_row_has_ended(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (1, 4)).expand(3, -1)
    greedy = generate(model, prompt_BS, max_new_tokens=12)
    eos = int(greedy[0, 7])
    first = int((greedy[0, 4:] == eos).nonzero()[0]) + 4
    ended = generate(model, prompt_BS, max_new_tokens=12, eos_id=eos)
    assert torch.equal(ended, greedy[:, : first + 1])


def test_a_row_that_has_ended_stays_ended(model: LanguageModel) -> None:
    prompt_BS = torch.randint(0, 61, (2, 4))
    greedy = generate(model, prompt_BS, max_new_tokens=12)
    # Something the first row says and the second does not.
    eos = next(t for t in greedy[0, 4:-1].tolist() if t not in greedy[1, 4:].tolist())
    ended = generate(model, prompt_BS, max_new_tokens=12, eos_id=eos)
    first = (ended[0, 4:] == eos).nonzero()[0, 0] + 4
    assert ended.shape[1] > first + 1  # the other row goes on
    assert (ended[0, first:] == eos).all()
    assert torch.equal(ended[1], greedy[1, : ended.shape[1]])
    assert torch.equal(ended[0, : first + 1], greedy[0, : first + 1])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 61], {}, "token 61"),
        ([1, -3], {}, "token -3"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"temperature": math.nan}, "temperature=nan"),
        ([1], {"temperature": math.inf}, "temperature=inf"),
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
            **({"max_new_tokens": 1} | options),  # type: ignore[arg-type]
        )


def test_a_prompt_without_rows_is_named(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        generate(model, torch.tensor([1, 2, 3]), max_new_tokens=1)
