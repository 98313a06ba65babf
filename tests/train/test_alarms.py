"""Every failure sounds its own alarm and no other; healthy runs sound none."""

from __future__ import annotations

import json
import math
import random
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.poison import train
from tools.ranks import on_ranks
from tools.record_curves import STEP_KEYS, instrument_keys
from trinity.core import job
from trinity.core.alarms import AlarmWatch
from trinity.core.instruments import Instrument, instruments
from trinity.core.load_config import load_config
from trinity.nn.moe import MoE
from trinity.train import step as step_module
from trinity.train.metrics import read_metrics
from trinity.train.probe_work import FixedWork
from trinity.train.stability import Judge
from trinity.train.step import StepResult
from trinity.train.watch import Watch

STEPS = [
    "train.num_steps=240",
    "checkpoint.every_steps=0",
    "log.instruments_every_steps=10",
    "stability.skip_spikes=true",
    "balance.step=1e-2",
    "batch.sequence_length=32",
    "batch.rows_per_step=8",
    "batch.microbatch_rows=8",
]
START = 120
"""The step at which things go wrong."""
BAD_ROWS = range(8 * START - 8, 8 * START)


@pytest.fixture
def calm_toml(tiny_toml: Path, tmp_path: Path) -> Path:
    """On text that is everywhere alike, so that whatever happens was done to the run."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 7))) for _ in range(60)
    ]
    text = tmp_path / "words.jsonl"
    with text.open("w") as file:
        for _ in range(1500):
            chosen = draw.choices(words, weights=range(1, 61), k=40)
            file.write(json.dumps({"text": " ".join(chosen)}) + "\n")
    lines = tiny_toml.read_text().replace(str(_source(tiny_toml)), str(text))
    tiny_toml.write_text(lines)
    return tiny_toml


def _source(toml: Path) -> str:
    return tomllib.loads(toml.read_text())["data"]["sources"][0]["path"]


def _alarms(directory: Path) -> set[object]:
    """What sounded, but for the speed: where a machine has other work to do, that is true."""
    events = read_metrics(directory, "event")
    return {row["name"] for row in events if row["event"] == "alarm"} - {"tokens_per_s"}


def _after_each_step(change: Callable[[int, MoE], None]) -> Any:
    """Let ``change`` have its way with every layer of experts once the biases have moved."""
    plain, steps = step_module.move_biases, [0]

    @torch.no_grad()
    def moved(moe_rows: Any, *arguments: Any) -> None:
        rows = list(moe_rows)
        plain(rows, *arguments)
        steps[0] += 1
        for _, moe in rows:
            if steps[0] >= START:
                change(steps[0], moe)

    return mock.patch.object(step_module, "move_biases", moved)


def _hot(_step: int, moe: MoE) -> None:
    moe.router.expert_bias[1] = 2.0


def _dead(_step: int, moe: MoE) -> None:
    moe.router.expert_bias[2] = -2.0


def _drifting(_step: int, moe: MoE) -> None:
    """Routers turn away from what they have learned, as far apart from one another as before."""
    even_EC, odd_EC = moe.router.weight[:, ::2].clone(), moe.router.weight[:, 1::2].clone()
    moe.router.weight[:, ::2] = math.cos(0.06) * even_EC - math.sin(0.06) * odd_EC
    moe.router.weight[:, 1::2] = math.sin(0.06) * even_EC + math.cos(0.06) * odd_EC


def test_a_healthy_run_sounds_none(calm_toml: Path, tmp_path: Path) -> None:
    train(calm_toml, tmp_path / "run", STEPS)
    assert _alarms(tmp_path / "run") == set()
    read = read_metrics(tmp_path / "run", "instruments")
    assert [row["step"] for row in read] == list(range(10, 241, 10))


@pytest.mark.parametrize(
    ("change", "alarm"),
    [(_hot, "max_vio_max"), (_dead, "dead_experts"), (_drifting, "router_drift")],
    ids=["hot expert", "dead expert", "router drift"],
)
def test_experts_gone_wrong(
    calm_toml: Path, tmp_path: Path, change: Callable[[int, MoE], None], alarm: str
) -> None:
    with _after_each_step(change):
        train(calm_toml, tmp_path / "run", STEPS)
    assert _alarms(tmp_path / "run") == {alarm}


def test_a_bad_batch(calm_toml: Path, tmp_path: Path) -> None:
    train(calm_toml, tmp_path / "run", STEPS, BAD_ROWS)
    assert _alarms(tmp_path / "run") == {"loss_score"}


def test_an_overflow(calm_toml: Path, tmp_path: Path) -> None:
    plain, calls = step_module.square_sum, [0]

    def overflowing(*arguments: Any) -> Tensor:
        calls[0] += 1
        total = plain(*arguments)
        return total * math.inf if calls[0] == START else total

    with mock.patch.object(step_module, "square_sum", overflowing):
        train(calm_toml, tmp_path / "run", STEPS)
    assert _alarms(tmp_path / "run") == {"overflow"}


def test_a_straggler(calm_toml: Path, tmp_path: Path) -> None:
    overrides = [*STEPS, "train.num_steps=90", "batch.microbatch_rows=4"]
    on_ranks(2, _with_a_slow_rank, calm_toml, tmp_path / "run", overrides)
    assert _alarms(tmp_path / "run") == {"straggler"}
    last = read_metrics(tmp_path / "run", "instruments")[-1]
    assert last["straggler_rank"] == 1


def _with_a_slow_rank(toml: Path, directory: Path, overrides: list[str]) -> None:
    with mock.patch.object(FixedWork, "read", return_value=3.0 + 4.0 * job.rank()):
        train(toml, directory, overrides)


def _instrument(**fields: Any) -> Instrument:
    given = {"name": "x", "title": "x", "unit": "1", "record": "train", "key": "x", "level": 2.0}
    return Instrument(**(given | {"severity": "warn", "first": "do"} | fields))


NAN = math.nan


@pytest.mark.parametrize(
    ("fields", "values", "steps"),
    [
        ({"alarm": "above"}, [1, 3, 3, 1, 3], [1, 4]),
        ({"alarm": "above", "records": 2}, [3, 1, 3, 3, 3, 1], [3]),
        ({"alarm": "above", "after": 2}, [3, 3, 3, 1], [2]),
        ({"alarm": "above"}, [1, NAN, 1], []),
        ({"alarm": "below"}, [3, 1, 3], [1]),
        ({"alarm": "jump"}, [9, 10, 11, 19, 22, 23, 10], [4]),
        ({"alarm": "slump", "level": 0.5}, [9, 10, 11, 6, 4], [4]),
        ({"alarm": "rise", "level": 0.1}, [5, 4, 4.3, 4.5, 4.2], [3]),
        ({"alarm": "stuck", "level": 1.0}, [1, 2, 2, 3], [2]),
        ({"alarm": "non_finite"}, [1, NAN, math.inf, 1], [1]),
    ],
)
def test_rules(fields: dict[str, Any], values: list[float], steps: list[int]) -> None:
    watch = AlarmWatch([_instrument(**fields)])
    sounded = [
        step
        for step, value in enumerate(values)
        if watch.feed({"kind": "train", "step": step, "x": value})
    ]
    assert sounded == steps
    assert watch.feed({"kind": "train", "step": 99, "y": 1.0}) == []


def test_a_cause_silences_its_consequences_and_those_that_come_late() -> None:
    cause = _instrument(name="cause", key="a", alarm="above", silences=("effect",))
    effect = _instrument(name="effect", key="b", alarm="above")
    watch = AlarmWatch([effect, cause])

    def names(step: int, a: float, b: float) -> list[str]:
        record = {"kind": "train", "step": step, "a": a, "b": b}
        return [alarm.instrument.name for alarm in watch.feed(record)]

    assert names(1, 3, 3) == ["cause"]
    assert names(2, 1, 1) == []
    assert names(50, 1, 3) == []
    for step in range(51, 160):
        assert names(step, 1, 1) == []
    assert names(160, 1, 3) == ["effect"]
    assert watch.active() == ["effect"]


def test_the_table_is_complete() -> None:
    table = instruments()
    for row in table.values():
        assert row.title
        assert row.unit
        assert set(row.silences) <= table.keys(), row.name
        assert row.first.endswith("."), row.name
        assert row.alarm in ("non_finite", "stuck") or row.level, row.name


HEALTHY = Path(__file__).parent / "fixtures/healthy.npz"
"""20,000 steps of a small model on the Python standard library, as tools/record_curves.py packs
them: configs/tiny.toml with hidden_size=48, 4 layers, 8 experts top-2, sequence_length=128, 4 rows
a step, fp32, one thread. Nothing was done to it."""


def test_20000_healthy_steps_sound_none(calm_toml: Path) -> None:
    """A real run's numbers through judge, watch and alarms, as the trainer would have seen them."""
    curves = np.load(HEALTHY)
    experts = ["model.num_experts=8", "model.num_experts_per_tok=2", "stability.skip_spikes=true"]
    config = load_config(calm_toml, [*experts, "rewind.enabled=true"])
    judge, watch, alarms = Judge(config.stability, config.optim), Watch(config), AlarmWatch()
    at_step: dict[int, list[dict[str, Any]]] = {}
    for step, row in zip(curves["instrument_steps"], curves["instruments"], strict=True):
        values = {k: v for k, v in zip(instrument_keys(), row.tolist(), strict=True) if v == v}
        at_step.setdefault(int(step), []).append({"kind": "instruments", **values})
    for step, loss in zip(curves["validation_steps"], curves["validation"], strict=True):
        at_step.setdefault(int(step), []).append({"kind": "validation", "loss": float(loss)})
    columns = {key: curves[key].tolist() for key in STEP_KEYS}
    loads = torch.from_numpy(curves["load"].astype(np.int64))
    sounded: list[str] = []
    for step in range(1, len(loads) + 1):
        known = {key: column[step - 1] for key, column in columns.items()}
        loss, norm = (
            torch.tensor(known[key], dtype=torch.float64) for key in ("loss", "grad_norm")
        )
        verdict = judge.verdict(loss, norm)
        result = StepResult(
            **{key: known[key] for key in STEP_KEYS if key != "next_row"},
            clip_factor=1.0,
            loss_score=float(verdict.loss_score),
            grad_score=float(verdict.norm_score),
            accepted=bool(verdict.accept),
            is_calm=bool(verdict.is_calm),
            num_stopping=0,
            num_tokens=512,
            load_LE=loads[step - 1],
        )
        derived = watch.observe(step, result)
        assert result.accepted, step
        assert watch.rewind_reason(step, derived) is None, step
        record = {"kind": "train", "overflow": 0.0, **known, **derived}
        for line in [record, *at_step.get(step, [])]:
            sounded += [alarm.instrument.name for alarm in alarms.feed({"step": step, **line})]
    assert sounded == []
    assert len(loads) == 20_000
