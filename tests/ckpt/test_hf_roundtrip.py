"""Hugging Face -> trinity -> Hugging Face is bit-identical, in both layouts of the experts."""

from __future__ import annotations

import filecmp
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AfmoeConfig, AfmoeForCausalLM, AutoTokenizer

import trinity
from trinity.ckpt.convert import convert_to_hf
from trinity.ckpt.hf import export_hf, import_hf
from trinity.core.config import ModelConfig
from trinity.data.tokenizer import train_tokenizer
from trinity.models.lm import LanguageModel

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_dense_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "route_scale": 2.448,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "mup_enabled": True,
    "max_position_embeddings": 256,
}


@pytest.fixture
def peer() -> AfmoeForCausalLM:
    """A random model of transformers; its router and expert bias are not left at zero."""
    peer = AfmoeForCausalLM(AfmoeConfig(**SHAPE, bos_token_id=0, eos_token_id=1)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "router" in name or "expert_bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return peer


def _save(peer: AfmoeForCausalLM, directory: Path, layout: str) -> Path:
    peer.save_pretrained(directory, save_original_format=layout == "per_expert")
    train_tokenizer(iter(["some words to train on"]), 300).save(directory)
    return directory


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("target_layout", ["per_expert", "fused"])
@pytest.mark.parametrize("source_layout", ["per_expert", "fused"])
def test_round_trip_is_bit_identical(
    peer: AfmoeForCausalLM, tmp_path: Path, source_layout: str, target_layout: str
) -> None:
    source = _save(peer, tmp_path / "source", source_layout)
    checkpoint = import_hf(source)
    assert checkpoint.layout == source_layout
    model = LanguageModel.on_meta(checkpoint.model_config).to_empty(device="cpu")
    checkpoint.load_into(model)
    export_hf(
        checkpoint.model_config,
        model.state_dict().__getitem__,
        tmp_path / "target",
        tokenizer_dir=source,
        max_shard_bytes=20_000,  # many files
        layout=target_layout,  # type: ignore[arg-type]
    )
    like = source
    if source_layout != target_layout:
        like = _save(peer, tmp_path / "like", target_layout)
    ours, theirs = _tensors(tmp_path / "target"), _tensors(like)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert len(set(index["weight_map"].values())) > 3


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_transformers_loads_an_export_without_a_missing_or_unexpected_key(
    peer: AfmoeForCausalLM, tmp_path: Path, layout: str
) -> None:
    source = _save(peer, tmp_path / "source", "per_expert")
    checkpoint = import_hf(source)
    export_hf(
        checkpoint.model_config,
        checkpoint.tensor,
        tmp_path / "target",
        tokenizer_dir=source,
        max_shard_bytes=10**9,
        layout=layout,  # type: ignore[arg-type]
    )
    again, info = AfmoeForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BS = torch.randint(0, 300, (2, 21))
    weights = peer.state_dict()
    assert weights.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    # In memory of its own: products take another path where a mapped file is not aligned.
    copy = AfmoeForCausalLM(again.config).eval()
    copy.load_state_dict(again.state_dict())
    assert torch.equal(copy(tokens_BS).logits, peer(tokens_BS).logits)
    model, tokenizer = trinity.load(tmp_path / "target")
    torch.testing.assert_close(model(tokens_BS), peer(tokens_BS).logits, rtol=1e-5, atol=1e-5)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "target")
    text = "words, 12345 of them\n"
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == theirs(text)["input_ids"]
    assert theirs.eos_token_id == tokenizer.eos_id


def test_config_json_has_legacy_and_new_keys(peer: AfmoeForCausalLM, tmp_path: Path) -> None:
    source = _save(peer, tmp_path / "source", "per_expert")
    convert_to_hf(source, tmp_path / "target", dtype="bf16", max_shard_bytes=10**9)
    written = json.loads((tmp_path / "target/config.json").read_text())
    for key, value in SHAPE.items():
        assert written[key] == value, key
    assert written["score_func"] == "sigmoid"
    assert written["route_norm"] is True
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10_000
    assert written["dtype"] == "bfloat16"
    tensors = _tensors(tmp_path / "target")
    biases = [name for name in tensors if name.endswith("expert_bias")]
    assert len(biases) == 3
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name in biases else torch.bfloat16), name


def test_legacy_config_is_read(peer: AfmoeForCausalLM, tmp_path: Path) -> None:
    source = _save(peer, tmp_path / "source", "per_expert")
    path = source / "config.json"
    values = json.loads(path.read_text())
    values.pop("rope_parameters", None)
    values |= {"rope_theta": 5000.0, "rope_scaling": None, "load_balance_coeff": 1e-3}
    values |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "score_func": "sigmoid"}
    path.write_text(json.dumps(values))
    config = import_hf(source).model_config
    assert config.rope_theta == 5000.0
    assert config.head_dim == 16
    assert config.layer_types == tuple(SHAPE["layer_types"])


def _live_bytes() -> int:
    """Memory of every tensor made since ``gc.freeze``, each storage once.

    Exact, unlike the size of the process.
    """
    storages = (o.untyped_storage() for o in gc.get_objects() if type(o) is torch.Tensor)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _anonymous_bytes() -> int:
    """Memory of the process that no file backs: mapped weights are backed, and can go."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class _Peak:
    """The most that was seen since the start, sampled where memory peaks."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what is there already is not looked at: that would take a minute
        self._before_bytes = _anonymous_bytes()
        self.live_bytes = self.anonymous_bytes = 0

    def sample(self) -> None:
        self.live_bytes = max(self.live_bytes, _live_bytes())
        self.anonymous_bytes = max(self.anonymous_bytes, _anonymous_bytes() - self._before_bytes)


def test_conversion_holds_a_shard_and_a_layer_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory while a 340 MB model streams out, and then through from directory to directory.

    Sampled when one of our tensors has just been made, and around the writing of a full shard.
    """
    shape = SHAPE | {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 48,
        "num_hidden_layers": 18,
        "layer_types": ["full_attention"] * 18,
    }
    config = ModelConfig.model_validate(shape)
    shapes = LanguageModel.on_meta(config).state_dict()
    sizes = [t.numel() * t.element_size() for t in shapes.values()]
    assert sum(sizes) > 300e6
    shard_bytes = 20_000_000
    # The shard, and the one tensor of ours that is being cut up for it.
    allowed_bytes = shard_bytes + max(sizes)

    def convert(source: Callable[[str], torch.Tensor], of: ModelConfig, target: Path) -> None:
        peak = _Peak()

        def tensor_of(name: str) -> torch.Tensor:
            tensor = source(name)
            peak.sample()
            return tensor

        def save(*arguments: Any, **options: Any) -> None:
            peak.sample()
            save_file(*arguments, **options)
            peak.sample()

        monkeypatch.setattr("trinity.ckpt.hf.save_file", save)
        try:
            export_hf(of, tensor_of, target, max_shard_bytes=shard_bytes)
        finally:
            gc.unfreeze()
        assert shard_bytes < peak.live_bytes <= allowed_bytes
        assert peak.anonymous_bytes < sum(sizes) / 3

    def make(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name].shape, dtype=shapes[name].dtype)
        return tensor.fill_(len(name) / 100)

    convert(make, config, tmp_path / "first")
    checkpoint = import_hf(tmp_path / "first")
    convert(checkpoint.tensor, checkpoint.model_config, tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) > 15
    for name in files:
        assert filecmp.cmp(tmp_path / "first" / name, tmp_path / "second" / name, shallow=False)


def test_tensors_come_one_by_one_under_our_names(peer: AfmoeForCausalLM, tmp_path: Path) -> None:
    checkpoint = import_hf(_save(peer, tmp_path / "source", "per_expert"))
    model = LanguageModel.on_meta(checkpoint.model_config).to_empty(device="cpu")
    checkpoint.load_into(model)
    state = model.state_dict()
    seen = dict(checkpoint.iter_tensors())
    assert state.keys() - seen.keys() == {name for name in state if name.endswith("bias_momentum")}
    for name, tensor in seen.items():
        assert torch.equal(state[name], tensor), name
    assert all(not state[name].any() for name in state.keys() - seen.keys())
    assert any(state[name].any() for name in state if name.endswith("expert_bias"))
