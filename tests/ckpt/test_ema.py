"""The average of the weights against a recursion written out, alone, in runs and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tools.ranks import on_ranks
from trinity.ckpt.ema import WeightAverage
from trinity.ckpt.load import load_run_dit
from trinity.ckpt.store import latest_checkpoint, load_tensors, stored_names
from trinity.core.config import EmaConfig
from trinity.core.errors import CheckpointError
from trinity.core.load_config import load_image_config
from trinity.core.sharding import local_tensor
from trinity.train import step as step_module
from trinity.train.command import pretrain_command
from trinity.train.loop import pretrain
from trinity.train.run import Run, create_run_directory, open_run
from trinity.train.step import train_step

SHORT = ["train.num_steps=4", "schedule.decay_steps=0", "train.validate_every_steps=0"]


class OnDevice(Tensor):
    """Takes the way of a GPU's flag: nobody may look at its value."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __bool__(self) -> bool:
        raise AssertionError("the host waited for the device")


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": nn.Parameter(torch.randn(5, 3, generator=generator)),
        "wide": torch.randn(4, generator=generator, dtype=torch.float64),
        "count": torch.arange(3),
    }


def _walk(weights: dict[str, Tensor], step: int) -> None:
    for name in ("weight", "wide"):
        generator = torch.Generator().manual_seed(step)
        moves = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        weights[name].data.add_(moves)


def _decay(step: int, config: EmaConfig) -> float:
    return min(config.decay, (step + 1) / (step + 10)) if config.warmup else config.decay


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("kind", [None, Tensor, OnDevice])
def test_it_is_the_recursion(decay: float, warmup: bool, kind: type[Tensor] | None) -> None:
    """Every fifth step is rejected, where steps can be; the weights are as they were then."""
    config = EmaConfig(decay=decay, warmup=warmup)
    weights = _weights()
    average = WeightAverage(weights, config)
    assert set(average.tensors) == {"weight", "wide"}
    expected = {name: weights[name].detach().double().clone() for name in average.tensors}
    for step in range(1, 31):
        is_accepted = kind is None or step % 5 != 0
        if is_accepted:
            _walk(weights, step)
            keep = _decay(step, config)
            for name, value in expected.items():
                expected[name] = keep * value + (1 - keep) * weights[name].detach().double()
        accept = None if kind is None else torch.tensor(is_accepted).as_subclass(kind)
        average.update(step, accept)
        for name, value in expected.items():
            # The device's flag is multiplied with the weight, in fp32.
            digits = 1e-13 if name == "wide" and kind is not OnDevice else 2e-6
            torch.testing.assert_close(
                average.tensors[name].double(), value, rtol=digits, atol=digits
            )
    assert not average.tensors["weight"].requires_grad


def test_a_rejected_step_leaves_every_bit() -> None:
    for kind in (Tensor, OnDevice):
        weights = _weights()
        average = WeightAverage(weights, EmaConfig(decay=0.5))
        _walk(weights, 1)
        before = {name: t.clone() for name, t in average.tensors.items()}
        average.update(1, torch.tensor(False).as_subclass(kind))
        assert all(torch.equal(t, before[name]) for name, t in average.tensors.items())


def test_a_warm_up_forgets_where_it_began() -> None:
    """After 20 steps of weights at 1 an average that began at 0 is nearly there."""
    weights = {"weight": torch.zeros(1)}
    averages = [
        WeightAverage(weights, EmaConfig(decay=0.999, warmup=warmup)) for warmup in (True, False)
    ]
    weights["weight"].fill_(1)
    for step in range(1, 21):
        for average in averages:
            average.update(step)
    left = math.prod((step + 1) / (step + 10) for step in range(1, 21))
    assert float(averages[0].tensors["weight"]) == pytest.approx(1 - left, rel=1e-5)
    assert left < 1e-4
    assert float(averages[1].tensors["weight"]) == pytest.approx(1 - 0.999**20, rel=1e-4)


def test_shards_are_averaged_where_they_lie() -> None:
    """Five rows over three ranks: shards of two rows, two and one."""
    alone = _averaged_linear(sharded=False)
    for part in on_ranks(3, _averaged_linear, True):
        assert part.keys() == alone.keys() == {"weight", "bias", "bias_moves"}
        for name, value in part.items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-12, atol=1e-12)


def _averaged_linear(sharded: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    model = nn.Linear(7, 5).double()
    model.register_buffer("bias_moves", torch.ones(3))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    average = WeightAverage(model.state_dict(), EmaConfig(decay=0.9))
    assert all(local_tensor(t).dtype.is_floating_point for t in average.tensors.values())
    for step in range(1, 6):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().sum().backward()  # of the same rows on every rank
        for parameter in model.parameters():
            assert parameter.grad is not None
            local_tensor(parameter).data.add_(local_tensor(parameter.grad), alpha=-0.01)
            parameter.grad = None
        assert isinstance(model.bias_moves, Tensor)
        model.bias_moves.add_(step)
        average.update(step, torch.tensor(step != 3))
    shards = average.tensors.items()
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in shards}
    return {name: t.numpy() for name, t in whole.items()}


def _opened(toml: Path, directory: Path, *overrides: str) -> Run:
    config = load_image_config(toml, overrides)
    create_run_directory(directory, config)
    return open_run(config, directory, torch.device("cpu"), resume=False)


def test_a_run_averages_all_its_weights_and_biases(tiny_images_toml: Path, tmp_path: Path) -> None:
    run = _opened(tiny_images_toml, tmp_path / "run", "balance.step=0.1", "ema.decay=0.6")
    assert run.average is not None
    names = run.model.state_dict().keys()
    expected = {name: t.double().clone() for name, t in run.model.state_dict().items()}
    for step in range(1, 6):
        train_step(
            run.model,
            run.optimizers,
            run.next_microbatches(),
            run.config,
            after_update=run.follow_weights,
        )
        keep = min(0.6, (1 + step) / (10 + step))
        for name, live in run.model.state_dict().items():
            expected[name] = keep * expected[name] + (1 - keep) * live.double()
        run.advance(1)
    assert run.average.tensors.keys() == names
    for name, value in expected.items():
        torch.testing.assert_close(
            run.average.tensors[name].double(), value, rtol=1e-5, atol=1e-6, msg=name
        )
    biases = [t for name, t in run.average.tensors.items() if name.endswith("expert_bias")]
    assert len(biases) == 2
    assert all(bias.any() for bias in biases)
    assert {f"ema.{name}" for name in names} <= run.tensors().keys()


def test_a_rejected_step_of_a_run_is_not_averaged(
    tiny_images_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _opened(tiny_images_toml, tmp_path / "run", "stability.skip_spikes=true")
    assert run.average is not None
    plain, seen = step_module.square_sum, []

    def overflowing(*arguments: Any) -> Tensor:
        return plain(*arguments) * (math.inf if run.step == 2 else 1.0)

    monkeypatch.setattr(step_module, "square_sum", overflowing)
    for _ in range(4):
        before = {name: t.clone() for name, t in run.average.tensors.items()}
        result = train_step(
            run.model,
            run.optimizers,
            run.next_microbatches(),
            run.config,
            after_update=run.follow_weights,
        ).result()
        run.advance(result.num_tokens)
        same = all(torch.equal(t, before[name]) for name, t in run.average.tensors.items())
        seen.append((result.accepted, same))
    assert seen == [(True, False), (True, False), (False, True), (True, False)]


@pytest.fixture
def run_dir(tiny_images_toml: Path, tmp_path: Path) -> Path:
    """A run of four steps with an average."""
    directory = tmp_path / "run"
    assert pretrain_command([str(tiny_images_toml), *SHORT], directory, None) == 0
    return directory


def _stored(run_dir: Path, prefix: str) -> dict[str, Tensor]:
    found, _ = latest_checkpoint(run_dir)
    assert found is not None
    names = [name for name in stored_names(found) if name.startswith(prefix)]
    return {name.removeprefix(prefix): t for name, t in load_tensors(found, names).items()}


def test_either_is_loaded_from_a_checkpoint(run_dir: Path) -> None:
    plain, averaged = _stored(run_dir, "model."), _stored(run_dir, "ema.")
    assert plain.keys() == averaged.keys()
    for average, wanted in ((True, averaged), (False, plain)):
        model = load_run_dit(run_dir, average=average)
        assert not model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
    differing = [name for name, t in plain.items() if not torch.equal(t, averaged[name])]
    assert len(differing) > 50


def test_a_run_keeps_an_average_or_not_from_its_first_step(
    run_dir: Path, tiny_images_toml: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"ema\.decay=0\.0, but .* holds an average"):
        pretrain_command(["ema.decay=0.0", "train.num_steps=8"], None, run_dir)
    plain = tmp_path / "plain"
    overrides = [*SHORT, "ema.decay=0.0"]
    assert pretrain_command([str(tiny_images_toml), *overrides], plain, None) == 0
    assert _stored(plain, "ema.") == {}
    wanted = _stored(plain, "model.")
    for name, tensor in load_run_dit(plain, average=True).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    with pytest.raises(CheckpointError, match=r"ema\.decay=0\.9, but .* holds no average"):
        pretrain_command(["ema.decay=0.9", "train.num_steps=8"], None, plain)


def test_a_resumed_average_is_that_of_an_uninterrupted_run(
    tiny_images_toml: Path, tmp_path: Path, run_dir: Path
) -> None:
    config = load_image_config(tiny_images_toml, [*SHORT, "train.num_steps=7"])
    create_run_directory(tmp_path / "whole", config)
    pretrain(config, tmp_path / "whole", torch.device("cpu"))
    assert pretrain_command(["train.num_steps=7"], None, run_dir) == 0
    whole, resumed = _stored(tmp_path / "whole", "ema."), _stored(run_dir, "ema.")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())
