"""Foreign Hugging Face directories: whatever does not fit or looks hostile is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trinity.ckpt.hf import export_hf, import_hf
from trinity.core.config import ModelConfig
from trinity.core.errors import CheckpointError
from trinity.data.tokenizer import load_tokenizer, train_tokenizer
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


def _as(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return tensors[NORM].to(dtype)


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
        "not an object",
    ),
    "index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "index is a nested bomb": (
        lambda d: (d / "model.safetensors.index.json").write_text("[" * 200_000),
        "not readable JSON",
    ),
    "map has a NUL": (_in_index(lambda m: m.update({NORM: "a\0b"})), "plain file names"),
    "map has a surrogate": (_in_index(lambda m: m.update({NORM: "\ud800"})), "plain file names"),
    "map has dots": (_in_index(lambda m: m.update({NORM: ".."})), "plain file names"),
    "file holds more than the index names": (
        lambda d: _edit_tensors(d, NORM, lambda t: t.update(more=torch.zeros(2))),
        "holds more, which the index does not name",
    ),
    "quantized weight": (
        lambda d: _edit_tensors(d, NORM, lambda t: t.update({NORM: _as(t, torch.float8_e4m3fn)})),
        f"{NORM} is F8_E4M3",
    ),
    "weight of integers": (
        lambda d: _edit_tensors(d, NORM, lambda t: t.update({NORM: _as(t, torch.int64)})),
        f"{NORM} is I64",
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
    "rope is no object": (_in_config(rope_parameters="x"), "rope_parameters='x' is not an object"),
    "scaled rope by its legacy key": (
        _in_config(rope_parameters={"type": "yarn", "rope_theta": 1e4}),
        "type='yarn'",
    ),
    "rope on a part of the head": (
        _in_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        r"rope_parameters\.partial_rotary_factor=0\.5",
    ),
    "rope by layer type": (
        _in_config(rope_parameters={"full_attention": {"rope_type": "yarn"}}),
        r"rope_parameters\.full_attention",
    ),
    "two rope bases": (
        _in_config(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}),
        "contradicts",
    ),
    "rope base of text": (_in_config(rope_theta="x", rope_parameters=None), "not a positive"),
    "endless rope base": (_in_config(rope_theta=float("inf")), "not a positive number"),
    "rope scaling": (_in_config(rope_scaling={"factor": 2}), "rope_scaling="),
    "unnormalised routes": (_in_config(route_norm=False), "route_norm=False"),
    "biased attention": (_in_config(attention_bias=True), "attention_bias=True"),
    "legacy expert groups": (_in_config(num_expert_groups=4), "num_expert_groups=4"),
    "quantized": (_in_config(quantization_config={"quant_method": "fp8"}), "quantization_config="),
    "vocabulary beyond measure": (_in_config(vocab_size=10**18), "vocab_size=10+ is beyond any"),
    "width beyond measure": (_in_config(hidden_size=10**12, head_dim=10**12), "sizes of this"),
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


def test_every_key_survives_any_value(directory: Path) -> None:
    """Whatever stands under a key of config.json, the answer is a checkpoint or a clear error."""
    path = directory / "config.json"
    good = json.loads(path.read_text())
    huge, nan = 10**18, float("nan")
    num_refused = 0
    for key in good:
        for value in (huge, 10**12, -1, 0, 1.5, True, "x", [], {}, None, nan, [[]], {"a": 1}):
            path.write_text(json.dumps(good | {key: value}))
            try:
                import_hf(directory)
            except CheckpointError:
                num_refused += 1
    assert num_refused > 150


def test_a_model_that_is_not_the_checkpoints_is_refused_untouched(directory: Path) -> None:
    checkpoint = import_hf(directory)
    for change, message in (
        ({"num_hidden_layers": 1}, "the model has no"),
        ({"num_hidden_layers": 3}, "holds nothing for"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "the model wants"),
        ({"moe_intermediate_size": 1}, "the model wants"),  # would broadcast
    ):
        layers = {"layer_types": (), "ffn_types": ()}  # filled in anew
        config = ModelConfig.model_validate(CONFIG.model_dump() | layers | change)
        model = LanguageModel.initialized(config, seed=1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_into(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_experts_of_different_dtypes_are_refused(directory: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    _edit_tensors(directory, name, lambda t: t.update({name: t[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=f"{name} is BF16"):
        import_hf(directory).tensor("backbone.layers.1.ffn.experts.gate_up")


def _export(config: ModelConfig, target: Path, tokenizer_dir: Path | None) -> None:
    model = LanguageModel.initialized(CONFIG, seed=0)
    export_hf(config, model.state_dict().__getitem__, target, tokenizer_dir=tokenizer_dir)


def test_an_export_loses_no_tensor_in_silence(tmp_path: Path) -> None:
    """A configuration with fewer experts than the weights have."""
    fewer = CONFIG.model_copy(update={"num_experts": 2})
    with pytest.raises(CheckpointError, match=r"router\.weight has shape \(4, 16\), not \(2, 16\)"):
        _export(fewer, tmp_path / "target", None)
    assert list(tmp_path.iterdir()) == []


def test_an_export_copies_no_file_from_elsewhere(tmp_path: Path) -> None:
    """A link in a stranger's tokenizer must not carry one's own files into what is published."""
    train_tokenizer(iter(["some words"]), 300).save(tmp_path / "tokenizer")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tokenizer/chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link that leads out"):
        _export(CONFIG, tmp_path / "target", tmp_path / "tokenizer")
    assert not (tmp_path / "target").exists()


def test_an_export_takes_no_larger_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(iter(["some words, and more of them"]), 301).save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size > CONFIG.vocab_size
    with pytest.raises(CheckpointError, match="entries, the model only 300"):
        _export(CONFIG, tmp_path / "target", tmp_path / "tokenizer")
    assert not (tmp_path / "target").exists()


def test_a_full_disk_leaves_no_half_export(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from trinity.ckpt.hf import export_hf\n"
        "from trinity.core.config import ModelConfig\n"
        "from trinity.core.errors import CheckpointError\n"
        "from trinity.models.lm import LanguageModel\n"
        f"config = ModelConfig.model_validate_json({CONFIG.model_dump_json()!r})\n"
        "model = LanguageModel.initialized(config, seed=0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    export_hf(config, model.state_dict().__getitem__, Path(sys.argv[1]))\n"
        "except CheckpointError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "target")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "free space there" in done.stderr
    assert list(tmp_path.iterdir()) == []


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
