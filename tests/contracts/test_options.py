"""No dead options: every field of the configuration is read by the program somewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.train.poison import GOES_BACK
from tests.train.poison import train as train_poisoned
from tools.ledger import HYBRID, axes_as_overrides, ledger_config, train
from tools.ranks import on_ranks
from trinity.ckpt.convert import convert_to_hf
from trinity.core import config, dit_config, image_run_config, images_config, load_config
from trinity.core.tables import Table
from trinity.train.command import pretrain_command
from trinity.train.run import create_run_directory

MODULES = (config, dit_config, image_run_config, images_config)
BASES = (Table, config.RunConfig, config.BackboneConfig)
"""What no run is configured by: their fields are those of the tables that extend them."""
ALL_TABLES = {
    value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Table) and value not in BASES
}

EXPANDED = {
    ("ModelConfig", "layer_pattern"),
    ("DiTConfig", "layer_pattern"),
    ("DiTConfig", "num_dense_layers"),
    ("DiTConfig", "global_attn_every_n_layers"),
}
"""Shorthand that validation expands into other fields."""


class Reads:
    """Notes which fields of the tables are read, but not by the validators of a configuration.

    The tables' own fields live in the instance dictionary, so attribute access sees every read.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._validating = False
        plain_getattribute, plain_validate = Table.__getattribute__, load_config.validate_config

        def recording(table: Table, name: str) -> Any:
            if not self._validating and name in type(table).model_fields:
                self.seen.add((type(table).__name__, name))
            return plain_getattribute(table, name)

        def quiet_validate(*arguments: Any, **options: Any) -> Any:
            self._validating = True
            try:
                return plain_validate(*arguments, **options)
            finally:
                self._validating = False

        patch.setattr(load_config, "validate_config", quiet_validate)
        patch.setattr(Table, "__getattribute__", recording)


def test_every_field_is_read_by_a_run_or_an_export(
    tiny_toml: Path,
    tiny_images_toml: Path,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = Reads(monkeypatch)
    _train_on_text(tiny_toml, tmp_path, repository)
    convert_to_hf(
        next((tmp_path / "runs").iterdir()), tmp_path / "hf", dtype="keep", max_shard_bytes=10**9
    )
    train_poisoned(tiny_toml, tmp_path / "rewound", GOES_BACK, range(80, 96))
    reads.seen |= _read_by_ranks(tmp_path, reads)
    _train_on_images(tiny_images_toml, tmp_path)
    _train_on_latents(tiny_images_toml, tmp_path)
    declared = {(table.__name__, name) for table in ALL_TABLES for name in table.model_fields}
    assert declared - reads.seen == EXPANDED


SHORT = ["train.num_steps=2", "schedule.warmup_steps=1", "schedule.decay_steps=1"]


def _train_on_text(toml: Path, root: Path, repository: Path) -> None:
    text = root / "notes.txt"
    text.write_text("a few words of plain text to train on, and then some more\n" * 200)
    overrides = [
        *SHORT,
        "batch.ramp=[{from_step=1, rows_per_step=8}]",
        f"data.sources=[{{name='fixture', path='{repository}/tests/data/fixtures/corpus.jsonl'}},"
        f" {{name='notes', path='{text}', format='text', weight=0.1}}]",
        "train.sample_prompt=a",
        "optim.router=adamw",  # matrices outside Muon are what AdamW decays
        "data.held_out_fraction=0.02",
    ]
    assert pretrain_command([str(toml), *overrides], None, None) == 0


def _read_by_ranks(root: Path, reads: Reads) -> set[tuple[str, str]]:
    """What a step on four ranks reads besides: the forked ranks record like their parent."""
    config = ledger_config(root, "fp32", [*axes_as_overrides({"pp": 2, "ep": 2}), *HYBRID])
    create_run_directory(root / "ranks", config)

    def work() -> set[tuple[str, str]]:
        train(config, root / "ranks", 1, resume=False)
        return reads.seen

    return set().union(*on_ranks(4, work))


def _train_on_images(toml: Path, root: Path) -> None:
    """Digits and pictures, a layer of every kind, and pictures drawn at several patch sizes."""
    (root / "pictures").mkdir()
    for number in range(4):
        Image.new("L", (9, 9), 50 * number).save(root / "pictures" / f"{number}.png")
    overrides = [
        *SHORT,
        "images.sources=[{name='digits', format='digits'},"
        f" {{name='own', format='folder', path='{root / 'pictures'}', crop='random'}}]",
        "images.flip=true",
        "model.layer_pattern='M-SE2EXEWE*E'",
        "samples.tau=0.1",
        "samples.num_steps=12",
    ]
    assert pretrain_command([str(toml), *overrides], None, None) == 0


def _train_on_latents(toml: Path, root: Path) -> None:
    """With embeddings."""
    tensors = {"latents": torch.randn(20, 1, 8, 8), "embeddings": torch.randn(20, 3)}
    save_file(tensors, root / "latents.safetensors")
    overrides = [
        *SHORT,
        f"images.sources=[{{name='l', format='latents', path='{root / 'latents.safetensors'}'}}]",
        *("model.condition=embedding", "model.num_classes=0", "model.embedding_width=3"),
        "train.validate_every_steps=0",
    ]
    assert pretrain_command([str(toml), *overrides], root / "latents", None) == 0
