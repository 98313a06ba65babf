"""No dead options: every field of the configuration is read by the program somewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.poison import GOES_BACK
from tests.train.poison import train as train_poisoned
from tools.ledger import HYBRID, axes_as_overrides, ledger_config, train
from tools.ranks import on_ranks
from trinity.ckpt.convert import convert_to_hf
from trinity.core import config as tables
from trinity.core.load_config import load_config
from trinity.train.command import pretrain_command
from trinity.train.run import create_run_directory

ALL_TABLES = [
    value
    for value in vars(tables).values()
    if isinstance(value, type) and issubclass(value, tables.Table) and value is not tables.Table
]

EXPANDED = {("ModelConfig", "layer_pattern")}
"""Shorthand that validation expands into other fields."""


def test_every_field_is_read_by_a_run_or_an_export(
    tiny_toml: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("a few words of plain text to train on, and then some more\n" * 200)
    overrides = [
        "batch.ramp=[{from_step=1, rows_per_step=8}]",
        f"data.sources=[{{name='fixture', path='{repository}/tests/data/fixtures/corpus.jsonl'}},"
        f" {{name='notes', path='{text}', format='text', weight=0.1}}]",
        "train.num_steps=2",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
        "train.sample_prompt=a",
        "optim.router=adamw",  # matrices outside Muon are what AdamW decays
        "data.held_out_fraction=0.02",
    ]
    # Validators read the fields they check; only what is read after construction counts. The
    # tables' own fields live in the instance dictionary, so attribute access sees every read.
    load_config(tiny_toml, overrides)
    read: set[tuple[str, str]] = set()
    constructing = [False]
    plain_getattribute = tables.Table.__getattribute__

    def recording(self: tables.Table, name: str) -> Any:
        if not constructing[0] and name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return plain_getattribute(self, name)

    def quiet_load(*arguments: Any, **options: Any) -> Any:
        constructing[0] = True
        try:
            return load_config(*arguments, **options)
        finally:
            constructing[0] = False

    for module in ("trinity.train.command", "trinity.train.run", "trinity.ckpt.load"):
        monkeypatch.setattr(f"{module}.load_config", quiet_load)
    monkeypatch.setattr("trinity.ckpt.convert.load_config", quiet_load, raising=False)
    monkeypatch.setattr(tables.Table, "__getattribute__", recording)
    run_dir = tmp_path / "run"
    assert pretrain_command([str(tiny_toml), *overrides], None, None) == 0
    run_dir = next((tmp_path / "runs").iterdir())
    convert_to_hf(run_dir, tmp_path / "exported", dtype="keep", max_shard_bytes=10**9)
    monkeypatch.setattr("tests.train.poison.load_config", quiet_load)
    train_poisoned(tiny_toml, tmp_path / "rewound", GOES_BACK, range(80, 96))
    read |= _read_by_ranks(tmp_path, read, constructing)
    declared = {(table.__name__, name) for table in ALL_TABLES for name in table.model_fields}
    assert declared - read == EXPANDED


def _read_by_ranks(
    tmp_path: Path, read: set[tuple[str, str]], constructing: list[bool]
) -> set[tuple[str, str]]:
    """What a step on four ranks reads besides: the forked ranks record like their parent."""
    constructing[0] = True
    axes = axes_as_overrides({"pp": 2, "ep": 2})
    config = ledger_config(tmp_path, "fp32", [*axes, *HYBRID])
    constructing[0] = False
    create_run_directory(tmp_path / "ranks", config)

    def work() -> set[tuple[str, str]]:
        train(config, tmp_path / "ranks", 1, resume=False)
        return read

    return set().union(*on_ranks(4, work))
