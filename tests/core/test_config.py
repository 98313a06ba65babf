"""Configuration: inheritance, overrides, and errors that name the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from trinity.core.errors import ConfigError
from trinity.core.layer_pattern import parse_layer_pattern
from trinity.core.load_config import dump_config, load_any_config, load_config

MAMBA_LAYERS = (
    "model.layer_types=['mamba2','mamba2s','2mamba','2mamba_e'];"
    "model.linear.head_dim=8;model.mamba2.head_dim=8;"
)


def test_extends_merges_tables_and_replaces_lists(tiny_toml: Path) -> None:
    child = tiny_toml.parent / "child.toml"
    child.write_text(
        f'extends = "{tiny_toml.name}"\nname = "child"\n[optim.muon]\nlr = 0.5\n'
        "[batch]\nramp = [{from_step = 3, rows_per_step = 8}]\n"
    )
    base, config = load_config(tiny_toml), load_config(child)
    assert config.name == "child"
    assert config.optim.muon.lr == 0.5
    assert config.optim.adamw == base.optim.adamw
    assert config.batch.ramp[0].rows_per_step == 8


def test_extends_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.toml")


def test_overrides_reach_tables_and_lists(tiny_toml: Path) -> None:
    config = load_config(
        tiny_toml,
        ["optim.muon.lr=2e-3", "data.sources.0.weight=3", "train.device=cpu", "data.packing=rsdb"],
    )
    assert config.optim.muon.lr == 2e-3
    assert config.data.sources[0].weight == 3
    assert config.train.device == "cpu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.muon.learning_rate=1", "unknown key `optim.muon.learning_rate`"),
        ("optim.mu.lr=1", r"did you mean `optim.muon`"),
        ("train.num_step=1", r"did you mean `train.num_steps`"),
        ("train.num_steps=many", r"`train.num_steps`.*got 'many'"),
        ("train.num_steps=0", r"`train.num_steps`.*greater than 0"),
        ("train.num_steps=2.5", r"`train.num_steps`"),
        ("model.num_experts_per_tok=9", "exceeds num_experts=4"),
        ("model.layer_types=['full_attention']", "one per layer"),
        ("model.head_dim=15", "must be even"),
        ("model.layer_pattern='ME'", "already sets num_hidden_layers; leave it out"),
        ("model.layer_pattern='MEGE*E*E'", "'G' at place 2: gated delta net layers are not impl"),
        ("model.layer_pattern='ME|ME'", r"at place 2: pipeline stages are set in \[parallel\]"),
        ("model.layer_pattern='MEQ'", r"'Q' at place 2: the letters are \* W M S 2 X - E"),
        ("model.ffn_types=['moe','moe','moe','moe']", "contradicts ffn_types"),
        ("model.linear.power=3", "model.linear.power"),
        (MAMBA_LAYERS + "model.linear.head_dim=7", "set linear.num_heads"),
        (MAMBA_LAYERS + "model.linear.norm_groups=7", "norm_groups=7 does not divide"),
        (MAMBA_LAYERS + "model.linear.norm='sum'", 'power 1 can be negative and need norm="rms"'),
        (MAMBA_LAYERS + "model.linear.num_kv_heads=3", "num_kv_heads=3 does not divide"),
        (MAMBA_LAYERS + "model.mamba2.num_groups=5", "num_groups=5 does not divide"),
        ("data.sources.4.weight=1", "must be an index from 0 to 0"),
        ("batch.rows_per_step=3", "not a multiple of"),
        ("data.tokenizer.path='x'", "exactly one"),
        ("data.tokenizer.vocab_size=1000", "exceeds model.vocab_size"),
        ("schedule.warmup_steps=100", "exceed train.num_steps"),
        ("optim.muon.lr", "not of the form key=value"),
    ],
)
def test_bad_overrides_name_the_key_and_the_remedy(
    tiny_toml: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_toml, override.split(";"))


def test_missing_key_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "x"')
    with pytest.raises(ConfigError, match="key `model` is missing"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_dump_reads_back_to_an_equal_config(tiny_toml: Path, repository: Path) -> None:
    for path in [tiny_toml, *sorted((repository / "configs").glob("*.toml"))]:
        config = load_any_config(path)
        copy = tiny_toml.parent / "copy.toml"
        copy.write_text(dump_config(config))
        assert load_any_config(copy) == config
        assert load_any_config(copy).sha256() == config.sha256()


def test_config_is_frozen_and_its_hash_follows_its_values(tiny_toml: Path) -> None:
    config = load_config(tiny_toml)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert load_config(tiny_toml, ["seed=8"]).sha256() != config.sha256()


def test_layer_patterns_of_other_stacks(repository: Path) -> None:
    """Nemotron-H 8B: 52 sublayers, 24 Mamba-2, 4 attention, 24 feed-forward."""
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    mixers, feed_forwards = parse_layer_pattern(pattern)
    assert (mixers.count("mamba2"), mixers.count("full_attention")) == (24, 4)
    assert feed_forwards.count("dense") == 24
    # An M before a * has no feed-forward of its own.
    assert mixers[3:5] == ("mamba2", "full_attention")
    assert feed_forwards[3:5] == ("none", "dense")
    # Two feed-forwards in a row: the second has no mixer.
    assert parse_layer_pattern("M--E") == (
        ("mamba2", "none", "none"),
        ("dense", "dense", "moe"),
    )
    model = load_config(repository / "configs/hybrid_30b.toml").model
    assert (model.layer_types.count("mamba2"), len(model.moe_layers)) == (23, 23)


def test_presets_and_overrides(tiny_toml: Path) -> None:
    linear = load_config(tiny_toml).model.linear
    assert linear.options("mamba2s") == (1, "rms", True, "softplus")
    assert linear.options("2mamba") == (2, "sum", False, "softplus")
    assert linear.options("2mamba_e") == ("exp", "sum", False, "softplus")
    changed = linear.model_copy(update={"decay": "mamba2", "value_dt": False})
    assert changed.options("mamba2s") == (1, "rms", False, "mamba2")


def test_layer_types_are_filled_three_to_one(repository: Path) -> None:
    types = load_config(repository / "configs/nano.toml").model.layer_types
    assert len(types) == 56
    assert types[:4] == ("sliding_attention",) * 3 + ("full_attention",)
    assert types.count("full_attention") == 14
