"""Instruments of a diffusion transformer against the definitions, computed the slow way."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.probe_cases import (
    make_config,
    make_image_config,
    make_trainer,
    microbatches_of,
    train,
)
from tools.ledger import LAYOUTS, axes_as_overrides, world_size_of
from tools.ranks import on_ranks
from trinity.core.alarms import AlarmWatch
from trinity.core.batch import FlowBatch
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.instruments import instruments
from trinity.nn import attention, linear_mixer
from trinity.nn.router import SigmoidRouter
from trinity.ops.attention import forgetting_attention
from trinity.ops.image_attention import image_attention
from trinity.train import probe_attention
from trinity.train.loop import pretrain
from trinity.train.metrics import read_metrics
from trinity.train.probe_noise import most_information, range_information, range_violation
from trinity.train.probes import Probes
from trinity.train.run import create_run_directory
from trinity.train.step import StepResult
from trinity.train.watch import Watch

OF_RANKS = {"rank_ms", "late_ms", "straggler", "straggler_rank"}
STRIDE = 2
"""96 positions, of which 64 at most are held against all others."""


class _Seen:
    """What the model itself computes with, of the first rows of its microbatches."""

    def __init__(self, trainer: Any, batches: list[FlowBatch], patch: pytest.MonkeyPatch) -> None:
        self.batches = batches
        self.router: dict[str, list[Tensor]] = defaultdict(list)
        self.attention: list[float] = []
        self._ways = 0
        for name, module in trainer.model.stages[0].model.named_modules():
            if isinstance(module, SigmoidRouter):
                module.register_forward_pre_hook(self._on_router(name))
        patch.setattr(attention, "image_attention", self._on_attention)
        patch.setattr(linear_mixer, "forgetting_attention", self._on_forgetting)

    def _on_router(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            batch = self.batches[len(self.router[name])]
            x_TD, time_BSD = args
            logits_TE = F.linear(x_TD, module.weight)
            per_token = time_BSD.expand(*batch.share_BS.shape, -1).flatten(0, 1)
            logits_TE = logits_TE + F.linear(per_token, module.time_weight)
            self.router[name].append(logits_TE[batch.share_BS.flatten() > 0].detach())

        return hook

    def _on_attention(self, q: Tensor, k: Tensor, v: Tensor, sight: Any, **options: Any) -> Tensor:
        self._note(q, k, options["window"], None)
        return image_attention(q, k, v, sight, **options)

    def _on_forgetting(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **more: Any) -> Tensor:
        self._note(q, k, None, decay, is_flipped=self._ways % 2 == 1)
        self._ways += 1
        return forgetting_attention(q, k, v, decay, **more)

    def _note(
        self,
        q: Tensor,
        k: Tensor,
        window: int | None,
        decay: Tensor | None,
        is_flipped: bool = False,
    ) -> None:
        batch = self.batches[len(self.attention) // 4]  # W, both ways of X, *
        ids, at, share = (
            (x[0].flip(0) if is_flipped else x[0]).tolist()
            for x in (batch.document_ids_BS, batch.coordinates_BSA, batch.share_BS)
        )
        q, k = q[0].detach(), k[0].detach().repeat_interleave(q.shape[1] // k.shape[1], 0)
        highest = -math.inf
        for i in range(0, len(ids), STRIDE):
            for j in range(len(ids)):
                seen = ids[i] == ids[j] and share[i] > 0
                if window is not None:
                    apart = max(abs(a - b) for a, b in zip(at[i], at[j], strict=True))
                    seen &= 2 * apart < window
                if decay is not None:
                    seen &= j <= i
                if not seen:
                    continue
                logits = (q[:, i] * k[:, j]).sum(-1) / q.shape[-1] ** 0.5
                if decay is not None:
                    lost = decay[0, :, j + 1 : i + 1].detach().sum(-1)
                    logits = logits + lost.repeat_interleave(len(logits) // len(lost))
                highest = max(highest, float(logits.max()))
        self.attention.append(highest)


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.linear.qk_norm=true"], ["model.linear.conv_width=1"]],
    ids=["convolved", "normed", "plain"],
)
def test_what_hooks_measure_is_what_the_model_computes(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Two microbatches of two rows, with padding, two sizes of patches and images of one row."""
    config = make_image_config(["batch.microbatch_rows=2", *overrides])
    trainer = make_trainer(config)
    batches, _ = microbatches_of(trainer, 0)
    assert all(isinstance(batch, FlowBatch) and (batch.share_BS == 0).any() for batch in batches)
    seen = _Seen(trainer, batches, monkeypatch)  # type: ignore[arg-type]
    record = train(trainer, 0, Probes(trainer.model, trainer.optimizers))
    rms = [torch.cat(parts).square().mean().sqrt().item() for parts in seen.router.values()]
    assert record["router_logit_rms_layers"] == pytest.approx(rms, rel=1e-9)
    of_calls = torch.tensor(seen.attention).view(len(batches), 4).amax(0).tolist()
    windowed, forward, backward, full = of_calls
    highest = [windowed, max(forward, backward), full]
    assert record["attention_logit_max_layers"] == pytest.approx(highest, rel=1e-6)
    assert record["attention_logit_max"] == pytest.approx(max(highest), rel=1e-6)
    assert forward != backward


@pytest.mark.parametrize("largest", ["forward", "backward"])
def test_both_ways_of_a_layer_are_looked_at(largest: str) -> None:
    """The way whose queries are a hundred times as long decides."""
    config = make_image_config()
    readings = []
    for factor in (1.0, 100.0):
        trainer = make_trainer(config)
        model = trainer.model.whole_model
        assert model is not None
        mixer: Any = model.backbone.layers["4"].mixer
        way = mixer if largest == "forward" else mixer.reverse
        with torch.no_grad():
            way.q_conv.weight *= factor
            way.q_conv.bias *= factor
        record = train(trainer, 0, Probes(trainer.model, trainer.optimizers))
        readings.append(record["attention_logit_max_layers"])
    (_, plain, _), (_, large, _) = readings
    assert large > 20 * plain


def test_drift_is_that_of_all_weights_of_a_router() -> None:
    trainer = make_trainer(make_image_config())
    model = trainer.model.whole_model
    assert model is not None
    probes = Probes(trainer.model, trainer.optimizers)
    train(trainer, 0, probes)
    routers = [moe.router for moe in model.moe_layers()]
    before = [torch.stack([*router.parameters()]).detach() for router in routers]
    assert [len(weights) for weights in before] == [2] * 5
    record = train(trainer, 1, probes)
    after = [torch.stack([*router.parameters()]).detach() for router in routers]
    drifts = [float((now - w).norm() / now.norm()) for now, w in zip(after, before, strict=True)]
    assert record["router_drift"] == pytest.approx(max(drifts), rel=1e-9)


def test_every_instrument_of_images_is_read_and_no_other() -> None:
    rows = [row for row in instruments().values() if row.record == "instruments"]
    for make, others in ((make_config, "images"), (make_image_config, "text")):
        trainer = make_trainer(make())
        record = train(trainer, 0, Probes(trainer.model, trainer.optimizers))
        assert {row.key for row in rows if row.runs != others} <= record.keys()
        assert record.keys().isdisjoint(row.key for row in rows if row.runs == others)
    assert {row.key for row in rows if row.runs == "text"} == {"logit_max", "logit_mean"}
    assert record["silent_experts"] == 0
    for kind in ("matrix", "router", "table", "vector"):
        assert record[f"grad_norm_{kind}"]
        assert record[f"update_ratio_{kind}"]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recompute_changes_no_reading(mode: str) -> None:
    plain, again = (
        train(trainer, 0, Probes(trainer.model, trainer.optimizers))
        for trainer in (
            make_trainer(make_image_config([f"train.recompute={each}", "batch.microbatch_rows=2"]))
            for each in ("none", mode)
        )
    )
    _assert_equal(plain, again, rel=1e-9)


def _assert_equal(one: dict[str, object], other: dict[str, object], *, rel: float) -> None:
    assert one.keys() == other.keys()
    for key in one.keys() - OF_RANKS:
        if one[key] is None:
            assert other[key] is None, key
        else:
            assert other[key] == pytest.approx(one[key], rel=rel), key


def test_measuring_changes_no_bit_and_leaves_nothing_behind() -> None:
    trainers = [make_trainer(make_image_config(dtype="bf16")) for _ in range(2)]
    probes = Probes(trainers[1].model, trainers[1].optimizers)
    for step in range(2):
        train(trainers[0], step)
        train(trainers[1], step, probes)
    plain, measured = (trainer.model.state_dict() for trainer in trainers)
    for name, tensor in plain.items():
        assert torch.equal(measured[name], tensor), name
    for module in trainers[1].model.stages[0].modules():
        assert not module._forward_hooks, module
        assert not module._forward_pre_hooks, module
        assert getattr(module, "context", None) is None
        assert getattr(module, "attention_context", None) is None


def _readings(config: ImageRunConfig) -> list[dict[str, object]]:
    trainer = make_trainer(config)
    probes = Probes(trainer.model, trainer.optimizers)
    return [train(trainer, step, probes) for step in range(2)]


@pytest.fixture(scope="module")
def single() -> dict[str, list[dict[str, object]]]:
    """Readings of one process, made once."""
    return {}


@pytest.mark.parametrize(
    "name",
    [
        *("tp2+sp", "cp2"),
        # What these add, experts and stages apart, the language model's tests see too.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2 x ep2", "tp2", "pp2")),
    ],
)
def test_readings_equal_those_of_one_process(
    single: dict[str, list[dict[str, object]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_attention, "QUERIES", 24)  # every fourth of 96, which forks inherit
    axes = LAYOUTS[name]
    if not single:
        single["one"] = _readings(make_image_config())
    config = make_image_config(axes_as_overrides(axes))
    by_rank = on_ranks(world_size_of(axes), _readings, config)
    assert all(readings == by_rank[0] for readings in by_rank)
    for one, other in zip(single["one"], by_rank[0], strict=True):
        _assert_equal(one, other, rel=1e-6)


def _load(*ranges: list[float]) -> Tensor:
    return torch.tensor([ranges], dtype=torch.float64)


def test_specialisation_by_hand() -> None:
    apart, alike = _load([4, 0], [0, 4]), _load([2, 2], [2, 2])
    assert range_information(apart).tolist() == pytest.approx([math.log(2)])
    assert range_information(alike).tolist() == pytest.approx([0.0], abs=1e-12)
    assert range_violation(apart).tolist() == [1.0]
    assert range_violation(alike).tolist() == [0.0]
    # ln 2 - (3/4 ln 4/3 + 1/4 ln 4)
    some = _load([3, 1], [1, 3])
    assert range_information(some).tolist() == pytest.approx([0.130812], abs=1e-6)
    assert range_violation(some).tolist() == [0.5]
    # Ranges 3/4 and 1/4, experts 1/2 and 1/2: ln 2 - 3/4 (ln 3 - 2/3 ln 2)
    uneven = _load([2, 1], [0, 1])
    assert range_information(uneven).tolist() == pytest.approx([0.215762], abs=1e-6)
    layers = torch.cat((apart, alike, some))
    assert range_information(layers).tolist() == pytest.approx([0.693147, 0, 0.130812], abs=1e-6)


def test_ranges_without_visits_or_with_few_say_nothing() -> None:
    assert range_violation(_load([6, 2], [0, 0])).tolist() == [0.5]
    assert range_information(_load([6, 2], [0, 0])).tolist() == [0.0]
    few = _load([100, 100], [1, 0])
    assert range_violation(few).tolist() == [0.0]
    assert range_violation(few, min_share=0.004).tolist() == [1.0]
    nothing = _load([0, 0], [0, 0])
    assert range_violation(nothing).tolist() == [0.0]
    assert range_information(nothing).tolist() == [0.0]


def test_the_most_that_is_possible() -> None:
    # Two of four experts each: even inside a range no expert has more than half.
    pairs = _load([1, 1, 0, 0], [0, 0, 1, 1])
    assert most_information(pairs, 2).tolist() == pytest.approx([math.log(2)])
    assert range_information(pairs).tolist() == pytest.approx([math.log(2)])
    four = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    assert most_information(four, 1).tolist() == pytest.approx([math.log(4)])
    assert most_information(four, 2).tolist() == pytest.approx([math.log(2)])
    # Ranges 3/4 and 1/4: their entropy.
    assert most_information(_load([3, 0], [0, 1]), 1).tolist() == pytest.approx([0.562335], 1e-6)


def _result(load_LUE: Tensor | None) -> StepResult:
    values = dict.fromkeys(
        ("loss", "z", "balance_loss", "grad_norm", "batch_het", "clip_factor", "loss_score"), 0.0
    )
    load_LE = torch.tensor([[1, 1]]) if load_LUE is None else load_LUE.sum(1)
    return StepResult(
        **values,
        **{"grad_score": 0.0, "accepted": True, "is_calm": True, "num_stopping": 0},
        **{"num_tokens": 1, "load_LE": load_LE, "load_LUE": load_LUE},
    )


def _watch() -> Watch:
    pattern = ["model.layer_pattern=WE", "model.load_buckets=2"]
    return Watch(
        make_image_config([*pattern, "model.num_experts=2", "model.num_experts_per_tok=1"])
    )


def test_loads_of_steps_are_added_up_and_outlive_a_restart() -> None:
    watch = _watch()
    first = watch.observe(1, _result(torch.tensor([[[4, 0], [0, 4]]])))
    assert first["sigma_max_vio"] == 1.0
    assert first["sigma_vio_share"] == 1.0
    assert first["sigma_information"] == pytest.approx(math.log(2))
    assert first["sigma_information_share"] == pytest.approx(1.0)
    state = watch.state()
    second = watch.observe(2, _result(torch.tensor([[[0, 4], [0, 0]]])))
    # 0.99 of what was, and the step's: [3.96, 4], [0, 3.96]
    assert second["sigma_max_vio"] == 1.0
    expected = range_information(_load([3.96, 4], [0, 3.96])).tolist()
    assert second["sigma_information_layers"] == pytest.approx(expected)
    resumed = _watch()
    resumed.load_state(state)
    assert resumed.observe(2, _result(torch.tensor([[[0, 4], [0, 0]]]))) == second
    del state["load_by_sigma"]  # a checkpoint of an earlier version
    resumed.load_state(state)


def test_runs_without_noise_levels_have_no_such_numbers() -> None:
    keys = {row.key for row in instruments().values() if row.runs == "images"}
    assert keys == {"sigma_information_share", "sigma_vio_share"}
    of_text = Watch(make_config()).observe(1, _result(None))
    dense = _watch().observe(1, _result(torch.zeros(0, 2, 2, dtype=torch.int64)))
    assert not [key for key in (*of_text, *dense) if "sigma" in key]


def test_an_alarm_comes_once_and_keeps_its_consequence_quiet() -> None:
    alarms = AlarmWatch()
    sounded = []
    for step in range(1, 301):
        record = {"kind": "train", "step": step, "sigma_information_share": 0.5}
        record["sigma_vio_share"] = 0.3
        if step > 220:
            record |= {"sigma_information_share": 0.85, "sigma_vio_share": 0.95}
        sounded += [(alarm.step, alarm.instrument.name) for alarm in alarms.feed(record)]
    assert sounded == [(270, "sigma_information")]


def test_the_record_of_a_run_on_images(tmp_path: Path) -> None:
    config = make_image_config(
        [
            *("log.instruments_every_steps=1", "log.load_every_steps=1", "log.tensorboard=false"),
            *("train.num_steps=2", "checkpoint.every_steps=0", f"images.cache_dir={tmp_path}"),
            "samples.num_steps=1",
        ],
        "fp32",
    )
    create_run_directory(tmp_path / "run", config)
    pretrain(config, tmp_path / "run", torch.device("cpu"))
    for row in read_metrics(tmp_path / "run", "train"):
        load = torch.tensor(row["load_by_sigma"])
        assert load.shape == (5, config.model.load_buckets, config.model.num_experts)
        assert load.sum(1).tolist() == row["load"]
        assert 0 <= row["sigma_information_share"] <= 1
        assert len(row["sigma_information_layers"]) == 5
        assert "z" not in row
    (_, read) = read_metrics(tmp_path / "run", "instruments")
    assert read["router_drift"] > 0
    assert not [key for key in read if key.startswith("logit")]
