"""Wrong arithmetic and changed memory, injected: found, told apart, the right rank blamed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.probe_cases import Trainer, make_config, make_trainer, microbatches_of, train
from tools.ledger import HYBRID, LAYOUTS, axes_as_overrides, world_size_of
from tools.ranks import on_ranks
from trinity.core import job
from trinity.train import corruption
from trinity.train.corruption import bit_hash, replay_mismatches, replica_mismatches

TWO_MICROBATCHES = ["batch.microbatch_rows=2"]
LAYER = "2"


class Fault:
    """One output of one layer's mixer, or its gradient, is wrong in some of the runs of a step."""

    def __init__(self, trainer: Trainer, runs: Iterable[int], *, backward: bool = False) -> None:
        self.runs, self.backward, self.num_calls = set(runs), backward, 0
        config, layout = trainer.config.batch, trainer.model.layout
        self.handles = []
        self.calls_per_run = config.rows_per_step // config.microbatch_rows // layout.dp
        for stage in trainer.model.stages:
            for name, block in stage.model.backbone.layers.items():
                if name == LAYER:
                    self.handles.append(block.mixer.register_forward_hook(self._hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, _module: Any, _args: Any, out: Tensor) -> Tensor:
        run = self.num_calls // self.calls_per_run
        self.num_calls += 1
        if run not in self.runs:
            return out
        wrong = torch.zeros_like(out)
        wrong[0, 3, 5] = 1e-6 * (1 + run)  # never the same twice
        if self.backward:
            out.register_hook(lambda grad: grad + wrong)
            return out
        return out + wrong


def _replay(trainer: Trainer, step: int = 0, **options: Any) -> tuple[str, ...]:
    """The passes of a step and their replay, which must leave everything as it was."""
    model = trainer.model
    microbatches, counts = microbatches_of(trainer, step)
    trainer.optimizers.zero_grad()
    model.pipeline.forward_backward(microbatches, counts)
    before = {name: t.clone() for name, t in _everything(trainer).items()}
    found = replay_mismatches(model, microbatches, counts, **options)
    after = _everything(trainer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for stage in model.stages:
        stage.take_losses()
    assert bool(found.lines) == (found.verdict != "same")
    return found.lines


def _everything(trainer: Trainer) -> dict[str, Tensor]:
    named = {"rng": torch.get_rng_state()}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        named[f"grad {name}"] = corruption.local_tensor(parameter.grad)
    for name, tensor in trainer.model.state_dict().items():
        named[name] = corruption.local_tensor(tensor)
    for number, stage in enumerate(trainer.model.stages):
        for turn, loss in enumerate(stage.losses):
            named |= {f"{number}.{turn}.{key}": t for key, t in loss._asdict().items()}
    return named


@pytest.mark.parametrize("overrides", [["train.recompute=full"], HYBRID], ids=["full", "hybrid"])
def test_a_sound_step_is_the_same_again(overrides: list[str]) -> None:
    trainer = make_trainer(make_config([*TWO_MICROBATCHES, *overrides], "bf16"))
    assert _replay(trainer) == ()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([0], "transient, in the step: it is not applied"),
        ([1], "transient, in the replay: the step itself is good"),
        ([0, 1, 2], "persistent: leave this host out"),
    ],
)
def test_faults_are_told_apart(runs: list[int], verdict: str, backward: bool) -> None:
    trainer = make_trainer(make_config(TWO_MICROBATCHES))
    fault = Fault(trainer, runs, backward=backward)
    (line,) = _replay(trainer)
    assert fault.num_calls == 3 * fault.calls_per_run
    assert line.startswith("rank 0 (")
    assert line.endswith(verdict)
    if runs == [0]:  # what the step did was not traced
        assert "first in" not in line
    elif backward:  # of the layer below, for which the mixer's gradient is used first
        assert "first in the gradient that reaches layer 1;" in line
    else:
        assert f"first in the output of layer {LAYER};" in line


def test_small_differences_are_let_pass_where_asked() -> None:
    trainer = make_trainer(make_config(TWO_MICROBATCHES))
    Fault(trainer, [1])
    assert _replay(trainer, tolerance=1e-4) == ()
    trainer = make_trainer(make_config(TWO_MICROBATCHES))
    Fault(trainer, [1])
    assert len(_replay(trainer, tolerance=1e-15)) == 1


def test_training_with_replays_is_training_without() -> None:
    trainers = [make_trainer(make_config([*TWO_MICROBATCHES, *HYBRID], "bf16")) for _ in range(2)]
    for step in range(2):
        train(trainers[0], step)
        _replay(trainers[1], step)
        train(trainers[1], step)
    plain, replayed = (trainer.model.state_dict() for trainer in trainers)
    for name, tensor in plain.items():
        assert torch.equal(replayed[name], tensor), name


def _replay_with_faults(
    overrides: list[str], faults: list[tuple[list[int], bool]]
) -> list[tuple[str, ...]]:
    """What is found with each fault on rank 1; first without any."""
    trainer = make_trainer(make_config(overrides))
    found = [_replay(trainer)]
    for runs, backward in faults:
        fault = Fault(trainer, runs if job.rank() == 1 else [], backward=backward)
        found.append(_replay(trainer))
        fault.remove()
    return found


def test_the_rank_that_errs_is_named() -> None:
    overrides = ["parallel.dp_shard=2"]
    faults = [([0], False), ([0], True), ([1], True), ([0, 1, 2], True), ([0, 1, 2], False)]
    by_rank = on_ranks(2, _replay_with_faults, overrides, faults)
    assert by_rank[0] == by_rank[1]
    sound, *found = by_rank[0]
    assert sound == ()
    for (runs, backward), lines in zip(faults, found, strict=True):
        assert all(("persistent" in line) == (len(runs) == 3) for line in lines)
        if (runs, backward) == ([0], True):  # all that is left of it are summed gradients
            assert [line[:8] for line in lines] == ["rank 0 (", "rank 1 ("]
        else:
            assert [line[:8] for line in lines] == ["rank 1 ("], (runs, backward)


@pytest.mark.parametrize("name", ["pp2 x ep2", "cp2", "tp2+sp"])
def test_sound_steps_of_several_ranks_are_the_same_again(name: str) -> None:
    axes = LAYOUTS[name]
    overrides = axes_as_overrides(axes)
    by_rank = on_ranks(world_size_of(axes), _replay_with_faults, overrides, [])
    assert by_rank == [[()]] * len(by_rank)


Damage = tuple[int, str, int]
"""Rank, tensor, and the bit of the last element here that flips."""


def _damage(overrides: list[str], damages: list[Damage]) -> list[list[str]]:
    """After a step: mismatches without and with each damage."""
    trainer = make_trainer(make_config(overrides))
    train(trainer, 0)
    # Leaves norms and routers gathered, as a validation does.
    trainer.model.pipeline.forward(microbatches_of(trainer, 1)[0])
    found = [replica_mismatches(trainer.model)]
    tensors = {n: corruption.local_tensor(t) for n, t in trainer.model.state_dict().items()}
    for rank, name, bit in damages:
        words = torch.zeros(1, dtype=torch.int64)
        if job.rank() == rank:
            words = tensors[name].view(corruption.WORDS[tensors[name].element_size()]).view(-1)
        words[-1] ^= 1 << bit
        found.append(replica_mismatches(trainer.model))
        words[-1] ^= 1 << bit
    return [*found, replica_mismatches(trainer.model)]


MATRIX = f"backbone.layers.{LAYER}.mixer.q_proj.weight"
EXPERTS = "backbone.layers.{}.ffn.experts.down"
NORM = f"backbone.layers.{LAYER}.mixer_pre_norm.weight"
BIAS = f"backbone.layers.{LAYER}.ffn.router.expert_bias"
DAMAGES: dict[str, tuple[dict[str, object], list[tuple[Damage, str]]]] = {
    # Ranks 0 and 2 hold the first shards, 1 and 3 the second.
    "hsdp2x2 x ep2": (
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        [
            ((1, MATRIX, 0), "values on ranks 1, 3 differ,"),
            ((2, EXPERTS.format(LAYER), 51), "values on ranks 0, 2 differ,"),
            ((2, BIAS, 3), "values on rank 2 differ from those on ranks 0, 1, 3"),
        ],
    ),
    "tp2": ({"tp": 2}, [((1, NORM, 62), "values on ranks 0, 1 differ,"), ((1, MATRIX, 2), "")]),
    "hsdp3": (
        {"dp_replicate": 3},
        [((1, MATRIX, 0), "values on rank 1 differ from those on ranks 0, 2")],
    ),
    "pp2 x hsdp2": (
        {"pp": 2, "dp_replicate": 2},
        [
            ((2, EXPERTS.format(4), 0), "values on ranks 2, 3 differ,"),
            ((0, NORM, 0), "values on ranks 0, 1 differ,"),
        ],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_flipped_bit_of_a_replica_is_found(case: str) -> None:
    axes, damages = DAMAGES[case]
    num_rows = 6 if "3" in case else 4
    overrides = [
        *axes_as_overrides(axes),
        f"batch.rows_per_step={num_rows}",
        "batch.sequence_length=32",
    ]
    by_rank = on_ranks(world_size_of(axes), _damage, overrides, [damage for damage, _ in damages])
    assert all(found == by_rank[0] for found in by_rank)
    before, *found, after = by_rank[0]
    assert before == after == []
    for ((_, name, _), text), lines in zip(damages, found, strict=True):
        assert len(lines) == bool(text)
        if text:
            assert lines[0].startswith(f"{name}: {text}"), lines


def test_one_process_has_no_replicas() -> None:
    assert replica_mismatches(make_trainer(make_config()).model) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_every_bit_counts_in_the_hash(dtype: torch.dtype) -> None:
    x = torch.randn(7).to(dtype)
    words = x.view(corruption.WORDS[x.element_size()])
    clean = bit_hash(x)
    for place in (0, 3, 6):
        for bit in range(8 * x.element_size() - 1):
            words[place] ^= 1 << bit
            assert bit_hash(x) != clean, (place, bit)
            words[place] ^= 1 << bit
    assert bit_hash(x) == clean
    assert bit_hash(torch.cat((x[1:2], x[:1], x[2:]))) != clean


def test_the_hash_does_not_depend_on_how_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 40)
    whole = bit_hash(x)
    assert bit_hash(x.T.contiguous().T) == whole
    assert bit_hash(x[:0]) == 0
    monkeypatch.setattr(corruption, "CHUNK_ELEMENTS", 7)
    assert bit_hash(x) == whole
