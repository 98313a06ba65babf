"""Byte-level BPE tokenizers: training one the way Trinity's was, loading anybody's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from trinity.core.errors import DataError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
PAD = "<|pad|>"
NUM_SPECIAL_TOKENS = 32
# Ids of Trinity's special tokens; the rest of the first 32 are reserved.
NAMED_SPECIAL_TOKENS = {
    0: BEGIN_OF_TEXT,
    1: END_OF_TEXT,
    2: "<|im_start|>",
    3: "<|im_end|>",
    4: "<|eot_id|>",
    12: PAD,
}
TOKENIZER_FILE = "tokenizer.json"
# Names that other families use, in order of preference, when a directory does not tell.
WELL_KNOWN_BOS = (BEGIN_OF_TEXT, "<s>", "<bos>", "<|startoftext|>", "[CLS]", "<|endoftext|>")
WELL_KNOWN_EOS = (END_OF_TEXT, "</s>", "<eos>", "<|endoftext|>", "[SEP]", "<|im_end|>")

SPACELESS_SCRIPTS = (
    r"[\u4E00-\u9FFF\u3400-\u4DBF\uF900-\uFAFF\u2F00-\u2FDF"
    r"\u3040-\u309F\u30A0-\u30FF\uFF65-\uFF9F]+"
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+"
    r"|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+"
)
ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
WORDS = (
    rf"{ASCII_SYMBOLS}[A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def special_tokens() -> list[str]:
    """The 32 special tokens, in the order of their ids."""
    return [
        NAMED_SPECIAL_TOKENS.get(i, f"<|reserved_special_token_{i}|>")
        for i in range(NUM_SPECIAL_TOKENS)
    ]


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Trinity's chain: digits in threes from the right, scripts without spaces, words, bytes."""

    def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Split(Regex(pattern), behavior)

    return pre_tokenizers.Sequence(
        [
            split(r"[0-9]+"),
            # Runs over 510 digits: the remainder first, so that what follows is whole threes.
            split(r"^[0-9]{1,510}(?=(?:[0-9]{510})+$)|[0-9]{510}"),
            # One or two leading digits when what follows is a multiple of three ...
            split(r"^[0-9]{1,2}(?=(?:[0-9]{3})+$)"),
            # ... which is then cut into threes: 1234567 -> 1 234 567.
            split(r"[0-9]{3}"),
            split(SPACELESS_SCRIPTS),
            split(WORDS),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Tokenizer:
    """A tokenizer with the two ids that documents are framed with."""

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_id: int, eos_id: int) -> None:
        self.inner = inner
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without begin or end marks."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as a document: begin mark, tokens, end mark."""
        # A document that spells a special token must not be able to forge one.
        self.inner.encode_special_tokens = True
        try:
            encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.inner.encode_special_tokens = False
        return [[self.bos_id, *encoding.ids, self.eos_id] for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    @property
    def sha256(self) -> str:
        """Hash of everything that determines the ids."""
        framing = f"{self.bos_id}/{self.eos_id}/"
        return hashlib.sha256((framing + self.inner.to_str()).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and the configuration that ``AutoTokenizer`` wants beside it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.inner.save(str(directory / TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.inner.id_to_token(self.bos_id),
            "eos_token": self.inner.id_to_token(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.inner.token_to_id(PAD) is not None:
            config["pad_token"] = PAD
        text = json.dumps(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with ``vocab_size`` entries, special tokens and bytes included.

    Raises DataError when the size leaves no room for special tokens and bytes.
    """
    smallest = NUM_SPECIAL_TOKENS + 256
    if vocab_size < smallest:
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size} is below {smallest}, the special tokens and "
            "bytes alone; raise it"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    bos_id, eos_id = (special_tokens().index(mark) for mark in (BEGIN_OF_TEXT, END_OF_TEXT))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A",
        pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT} $B",
        special_tokens=[(BEGIN_OF_TEXT, bos_id)],
    )
    return Tokenizer(inner, bos_id=bos_id, eos_id=eos_id)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json``, or the one in a directory, of any Hugging Face tokenizer.

    Begin and end marks come from the files beside it where they tell, else from well-known names.
    Raises DataError naming the file and what is wrong with it.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such tokenizer file; data.tokenizer.path must name one")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    # The library raises a bare Exception for every kind of damage.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{file} is not a readable tokenizer.json: {error}") from None
    named = _named_tokens(file.parent)
    eos_id = _first_id(inner, [*named.get("eos_token", []), *WELL_KNOWN_EOS])
    bos_id = _first_id(inner, [*named.get("bos_token", []), *WELL_KNOWN_BOS])
    if eos_id is None:
        raise DataError(
            f"{file}: cannot tell the end-of-text token; name it as eos_token in "
            "tokenizer_config.json beside it"
        )
    return Tokenizer(inner, bos_id=eos_id if bos_id is None else bos_id, eos_id=eos_id)


def _named_tokens(directory: Path) -> dict[str, list[str]]:
    """Tokens named as begin or end of text in the files beside a tokenizer."""
    named: dict[str, list[str]] = {}
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = directory / file_name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not valid JSON: {error}; mend or remove it") from None
        for key in ("bos_token", "eos_token"):
            token = values.get(key)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                named.setdefault(key, []).append(content)
    return named


def _first_id(inner: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    return next((i for name in names if (i := inner.token_to_id(name)) is not None), None)
