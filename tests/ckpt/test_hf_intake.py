"""Foreign Hugging Face directories: whatever does not fit or looks hostile is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trinity.ckpt.hf import export_hf, import_hf
from trinity.core.config import ModelConfig
from trinity.core.errors import CheckpointError
from trinity.data.tokenizer import train_tokenizer
from trinity.models.lm import LanguageModel

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_dense_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    route_scale=1.0,
    sliding_window=4,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good directory with several weight files."""
    train_tokenizer(iter(["some words"]), 300).save(tmp_path / "tokenizer")
    model = LanguageModel.initialized(CONFIG, seed=0)
    export_hf(
        CONFIG,
        model.state_dict().__getitem__,
        tmp_path / "model",
        tokenizer_dir=tmp_path / "tokenizer",
        max_shard_bytes=8_000,
    )
    import_hf(tmp_path / "model")  # good before it is tampered with
    return tmp_path / "model"


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def _edit_tensors(directory: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def _in_index(edit: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def tamper(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        _edit_json(path, lambda values: edit(values["weight_map"]))

    return tamper


def _in_config(**changes: object) -> Callable[[Path], None]:
    def tamper(directory: Path) -> None:
        _edit_json(directory / "config.json", lambda values: values.update(changes))

    return tamper


def _without(key: str) -> Callable[[Path], None]:
    return lambda directory: _edit_json(directory / "config.json", lambda v: v.pop(key))


def _move_out(directory: Path) -> None:
    first = min(directory.glob("model-*.safetensors"))
    outside = first.rename(directory.parent / "outside.safetensors")
    first.symlink_to(outside)


def _only_pickle(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))


NORM, HEAD = "model.norm.weight", "lm_head.weight"
TAMPER: dict[str, tuple[Callable[[Path], object], str]] = {
    "map leads up": (_in_index(lambda m: m.update({NORM: "../outside.safetensors"})), "plain file"),
    "map is absolute": (_in_index(lambda m: m.update({NORM: "/etc/passwd"})), "plain file names"),
    "map is no name": (_in_index(lambda m: m.update({NORM: 3})), "plain file names"),
    "link leads out": (_move_out, "link that leads out"),
    "file is missing": (lambda d: min(d.glob("model-*")).unlink(), "is missing"),
    "file is truncated": (
        lambda d: os.truncate(min(d.glob("model-*")), 200),
        "not a readable safetensors file",
    ),
    "huge header": (
        lambda d: min(d.glob("model-*")).write_bytes(b"\xff" * 16),
        "not a readable safetensors file",
    ),
    "index is garbage": (
        lambda d: (d / "model.safetensors.index.json").write_text("[1]"),
        "not a readable index",
    ),
    "pickle only": (_only_pickle, "is a pickle, which is not read"),
    "tensor missing": (_in_index(lambda m: m.pop(NORM)), f"{NORM} is missing"),
    "index names what the file lacks": (
        lambda d: _edit_tensors(d, NORM, lambda t: t.pop(NORM)),
        f"lacks {NORM}",
    ),
    "tensor unexpected": (
        lambda d: (
            _edit_tensors(d, NORM, lambda t: t.update(more=torch.zeros(2))),
            _in_index(lambda m: m.update(more=m[NORM]))(d),
        ),
        "more is unexpected",
    ),
    "wrong shape": (
        lambda d: _edit_tensors(d, NORM, lambda t: t.update({NORM: torch.zeros(3)})),
        rf"{NORM} has shape \(3,\)",
    ),
    "another family": (_in_config(model_type="llama"), "model_type is 'llama'"),
    "softmax router": (_in_config(score_func="softmax"), "score_func='softmax'"),
    "tied": (_in_config(tie_word_embeddings=True), "tie_word_embeddings=True"),
    "grouped routing": (_in_config(n_group=4), "n_group=4"),
    "scaled rope": (
        _in_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope_type='yarn'",
    ),
    "no head_dim": (_without("head_dim"), "head_dim is missing"),
    "no route_scale": (_without("route_scale"), "route_scale is missing"),
    "config is no object": (lambda d: (d / "config.json").write_text("[]"), "not an object"),
    "config is garbage": (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    "nested bomb": (lambda d: (d / "config.json").write_text("[" * 200_000), "not readable JSON"),
    "a billion layers": (
        _in_config(num_hidden_layers=10**9, layer_types=None, global_attn_every_n_layers=4),
        "num_hidden_layers: Input should be less than",
    ),
    "a billion experts": (_in_config(num_experts=10**9), "do not belong together"),
    "another width": (_in_config(hidden_size=32), "has shape"),
    "bad value": (_in_config(num_attention_heads="many"), "num_attention_heads"),
}


@pytest.mark.parametrize("kind", TAMPER)
def test_what_does_not_fit_is_refused_by_name(directory: Path, kind: str) -> None:
    tamper, message = TAMPER[kind]
    tamper(directory)
    with pytest.raises(CheckpointError, match=message):
        import_hf(directory)


def test_code_named_by_a_checkpoint_is_never_imported(directory: Path) -> None:
    evidence = directory / "executed"
    (directory / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\n")
    _in_config(auto_map={"AutoModelForCausalLM": "evil.Model"})(directory)
    import_hf(directory)
    assert not evidence.exists()


def test_an_export_never_overwrites(directory: Path, tmp_path: Path) -> None:
    model = LanguageModel.initialized(CONFIG, seed=0)
    with pytest.raises(CheckpointError, match="not empty"):
        export_hf(
            CONFIG,
            model.state_dict().__getitem__,
            directory,
            tokenizer_dir=tmp_path / "tokenizer",
            max_shard_bytes=10**9,
        )
