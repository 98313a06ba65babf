"""Trinity's pre-tokenisation chain, lossless byte-level BPE, and loading of other tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trinity.core.errors import DataError
from trinity.data.tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    Tokenizer,
    load_tokenizer,
    pre_tokenizer,
    train_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1234567\n", "the quick brown fox, and the dog\n" * 20]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 400)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["1", "234", "567"]),
        ("12345", ["12", "345"]),
        ("123456", ["123", "456"]),
        ("7", ["7"]),
        ("a12b", ["a", "12", "b"]),
        ("1" * 513, ["1" * 3] * 171),
        ("1" * 511, ["1"] + ["1" * 3] * 170),
        ("2" * 1022, ["22"] + ["2" * 3] * 340),
        ("hello world", ["hello", "Ġworld"]),
        ("it's x(y)", ["it", "'s", "Ġx", "(y", ")"]),
        ("a\n\n  b", ["a", "ĊĊ", "Ġ", "Ġb"]),
        ("日本 x", ["æĹ¥æľ¬", "Ġx"]),
    ],
)
def test_chain_of_pre_tokenisers(text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in pre_tokenizer().pre_tokenize_str(text)] == pieces


def test_scripts_without_spaces_stand_apart() -> None:
    pieces = [p for p, _ in pre_tokenizer().pre_tokenize_str("สวัสดีคุณ한국어ひらがな")]
    assert len(pieces) == 3


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives(text: str) -> None:
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode_documents([text])[0]) == text


_cache: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _cache:
        _cache.append(train_tokenizer(iter(TEXTS), 400))
    return _cache[0]


def test_documents_are_framed_and_cannot_forge_marks(trained: Tokenizer) -> None:
    ids = trained.encode_documents([f"a {END_OF_TEXT} b"])[0]
    assert ids[0] == trained.bos_id == trained.inner.token_to_id(BEGIN_OF_TEXT) == 0
    assert ids[-1] == trained.eos_id == trained.inner.token_to_id(END_OF_TEXT) == 1
    assert trained.eos_id not in ids[1:-1]
    assert trained.inner.token_to_id("<|im_start|>") == 2
    assert trained.inner.token_to_id("<|pad|>") == 12


def test_saved_tokenizer_loads_here_and_in_transformers(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == trained.sha256
    assert (again.bos_id, again.eos_id) == (0, 1)
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == trained.vocab_size
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the fox wrote 12345 lines\n"
    assert theirs(text)["input_ids"] == [0, *trained.encode(text)]
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_any_hugging_face_tokenizer_is_understood(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "<stop>": 2}))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="cannot tell the end-of-text token"):
        load_tokenizer(tmp_path)
    config = {"eos_token": {"content": "<stop>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (2, 2)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a readable tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="vocab_size=100 is below 288"):
        train_tokenizer(iter(TEXTS), 100)
