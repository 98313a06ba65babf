"""The rows of the ablation (:mod:`tools.ablation`): which configuration each name stands for.

Every row is ``configs/ablation.toml`` with overrides, and a dense feed-forward as wide as makes its
parameters those of its table's first row, to within ``TOLERANCE``.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.ledger import ROOT
from trinity.core.config import Config
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_config
from trinity.models.lm import parameter_counts

CONFIG = ROOT / "configs/ablation.toml"
BUILD_UP, RATIO = "build-up", "ratio"
TOLERANCE = 0.01
"""Largest relative difference in parameters between the rows of a table."""
WIDTH_STEP = 4
"""Feed-forward widths are multiples of this: odd ones are slow."""


class Row(NamedTuple):
    """One line of a table."""

    key: str
    """Of the command line and of the saved file."""
    title: str
    overrides: tuple[str, ...]
    versus: str = ""
    """Key of the row that this one changes; the difference is formed seed by seed."""
    paper: float | None = None
    """Held-out loss in arXiv 2602.17363, small model, 2048 tokens."""
    linear_share: float = 0.0
    """Part of the layers that is linear-time; only of the ratio table."""


def _linear(key: str, title: str, kind: str, *options: str, **rest: object) -> Row:
    """A dense model whose mixers are all of one type, with overrides of ``[model.linear]``."""
    overrides = (_mixers([kind] * 3), *(f"model.linear.{option}" for option in options))
    return Row(key, title, overrides, **rest)  # type: ignore[arg-type]


def _mixers(kinds: list[str]) -> str:
    return f"model.layer_types={json.dumps(kinds)}"


_NO_STEP, _PLAIN = "value_dt=false", ("conv_width=1", 'decay="none"')
BUILD_UP_ROWS = (
    _linear("linear", "linear attention, output norm", "mamba2s", *_PLAIN, _NO_STEP, paper=3.13),
    _linear(
        "conv",
        "+ convolution over 2 tokens",
        "mamba2s",
        'decay="none"',
        _NO_STEP,
        versus="linear",
        paper=2.93,
    ),
    _linear(
        "mamba2-decay",
        "+ Mamba-2's decay, with its step bias",
        "mamba2s",
        'decay="mamba2"',
        _NO_STEP,
        versus="conv",
        paper=2.80,
    ),
    _linear(
        "softplus-decay",
        "+ softplus decay in its place",
        "mamba2s",
        _NO_STEP,
        versus="mamba2-decay",
        paper=2.77,
    ),
    _linear(
        "mamba2s",
        "+ step on values = Mamba-2S",
        "mamba2s",
        versus="softplus-decay",
        paper=2.76,
    ),
    _linear(
        "2mamba",
        "squared, divided by its sum, no step = 2Mamba",
        "2mamba",
        versus="mamba2s",
        paper=2.73,
    ),
    _linear("2mamba-e", "exponential in its place = 2Mamba-E", "2mamba_e", versus="2mamba"),
    _linear(
        "softmax-conv",
        "2Mamba-E that never forgets: softmax, convolution, no positions",
        "2mamba_e",
        'decay="none"',
        versus="2mamba-e",
    ),
    _linear(
        "softmax",
        "the same without the convolution",
        "2mamba_e",
        *_PLAIN,
        versus="softmax-conv",
    ),
    Row(
        "gated-nope",
        "softmax with QK-norm and output gate, no positions",
        (_mixers(["full_attention"] * 3),),
        versus="softmax",
    ),
    Row(
        "gated-rope",
        "softmax with QK-norm, output gate and rotary positions",
        (_mixers(["sliding_attention"] * 3),),
        versus="gated-nope",
        paper=2.73,
    ),
    Row(
        "mamba2",
        "Mamba-2, all heads",
        (_mixers(["mamba2"] * 3),),
        versus="mamba2s",
    ),
    Row(
        "mamba2-one-head",
        "Mamba-2, one head per layer, convolution over 2 tokens",
        (_mixers(["mamba2"] * 3), "model.mamba2.num_heads=1", "model.mamba2.conv_width=2"),
        versus="mamba2",
        paper=2.88,
    ),
    _linear(
        "mamba2s-slow",
        "Mamba-2S, half-lives start from 1 to 1000 tokens",
        "mamba2s",
        'decay_bias="log_spaced"',
        versus="mamba2s",
    ),
    _linear(
        "2mamba-slow",
        "2Mamba, half-lives start from 1 to 1000 tokens",
        "2mamba",
        'decay_bias="log_spaced"',
        versus="2mamba",
    ),
    _linear("2mamba-qk-norm", "2Mamba, QK-norm", "2mamba", "qk_norm=true", versus="2mamba"),
)
"""The table of the paper, our baselines, and what the paper left out."""

_MOE = (
    "model.num_hidden_layers=4",
    "model.num_dense_layers=1",
    "model.sliding_window=128",
)
_LINEAR_LAYERS = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}
"""Which of the four layers are linear; the last is always global attention."""


def _hybrid(kind: str, num_linear: int) -> Row:
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    for layer in _LINEAR_LAYERS.get(num_linear, ()):
        layers[layer] = kind
    key = f"{kind}-{num_linear}of4" if num_linear else "attention"
    name = "Mamba-2S" if kind == "mamba2s" else "2Mamba"
    title = f"{name} in {num_linear} of 4" if num_linear else "attention, 3 sliding and 1 global"
    versus = "attention" if num_linear else ""
    return Row(key, title, (*_MOE, _mixers(layers)), versus, linear_share=num_linear / 4)


RATIO_ROWS = (
    _hybrid("", 0),
    *(_hybrid(kind, num) for kind in ("mamba2s", "2mamba") for num in (1, 2, 3)),
)
"""Linear-time layers in place of the sliding-window layers of the mixture-of-experts backbone."""

TABLES = {BUILD_UP: BUILD_UP_ROWS, RATIO: RATIO_ROWS}
TUNED = ("mamba2s", "2mamba", "2mamba-e", "gated-rope", "mamba2")
"""Rows of the build-up that stand for their family when the learning rate is chosen."""


def row_of(table: str, key: str) -> Row:
    """The row by its key. Raises ConfigError when there is none."""
    for row in TABLES[table]:
        if row.key == key:
            return row
    keys = ", ".join(row.key for row in TABLES[table])
    raise ConfigError(f"the {table} table has no row {key!r}; use one of {keys}")


def row_config(
    table: str, row: Row, *, seed: int, lr_factor: float, overrides: tuple[str, ...] = ()
) -> Config:
    """The configuration of one run; ``lr_factor`` multiplies the rates of both optimizers.

    Raises ConfigError when no feed-forward gives the row the parameters of its table.
    """
    rates = load_config(CONFIG, overrides).optim
    return load_config(
        CONFIG,
        [
            *overrides,
            *row.overrides,
            f"seed={seed}",
            f"model.intermediate_size={equal_width(table, row, overrides)}",
            f"optim.muon.lr={rates.muon.lr * lr_factor}",
            f"optim.adamw.lr={rates.adamw.lr * lr_factor}",
        ],
    )


@cache
def equal_width(table: str, row: Row, overrides: tuple[str, ...] = ()) -> int:
    """Dense feed-forward width that gives ``row`` the parameters of the table's first row."""
    base = load_config(CONFIG, [*overrides, *row.overrides]).model.intermediate_size
    target = num_parameters(TABLES[table][0], base, overrides)
    here = num_parameters(row, base, overrides)
    per_unit = num_parameters(row, base + 1, overrides) - here
    width = base + round((target - here) / per_unit)
    width = max(round(width / WIDTH_STEP), 1) * WIDTH_STEP
    error = num_parameters(row, width, overrides) / target - 1
    if abs(error) > TOLERANCE:
        raise ConfigError(
            f"row {row.key!r} differs by {error:+.1%} in parameters from the {table} table even "
            f"with intermediate_size={width}; raise intermediate_size in {CONFIG.name}"
        )
    return width


@cache
def num_parameters(row: Row, intermediate_size: int, overrides: tuple[str, ...] = ()) -> int:
    """Parameters of the row's model with a dense feed-forward of that width."""
    width = f"model.intermediate_size={intermediate_size}"
    model = load_config(CONFIG, [*overrides, *row.overrides, width]).model
    return parameter_counts(model)["total"]


def settings_hash(config: Config, row: Row, overrides: tuple[str, ...]) -> str:
    """Changes with whatever a run is set by, but not when a new key gets a default elsewhere."""
    values = tomllib.loads(Path(CONFIG).read_text(encoding="utf-8"))
    run = [config.seed, config.optim.muon.lr, config.model.intermediate_size]
    text = json.dumps([values, overrides, row.overrides, run], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
