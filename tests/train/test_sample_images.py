"""Pictures out of a finished run: what the command draws is what a loop by hand draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from trinity.ckpt.load import load_run_dit
from trinity.cli import app
from trinity.core.draws import Stream, generator_for
from trinity.core.errors import ConfigError, DataError, TrinityError
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.load_config import load_image_config
from trinity.models.dit import DiffusionTransformer
from trinity.models.patch_scheduler import PatchDecision
from trinity.train.command import pretrain_command
from trinity.train.sample_conditions import class_columns
from trinity.train.sample_images import SAMPLING, sample


def _draw(run_dir: Path, root: Path, *options: str) -> tuple[Tensor, str]:
    """Samples of the command, and what it said."""
    files = ["--output", str(root / "grid.png"), "--save", str(root / "deep/samples.safetensors")]
    done = CliRunner().invoke(app, ["sample-images", str(run_dir), *files, *options])
    if done.exception is not None:
        raise done.exception
    return load_file(root / "deep/samples.safetensors")["samples"], done.output


@torch.inference_mode()
def _by_hand(
    model: DiffusionTransformer,
    classes: list[int],
    *,
    seed: int = 0,
    num_steps: int = 8,
    guidance: float = 2.0,
    scale_of: Callable[[int, int], int] = lambda row, step: 1,
) -> Tensor:
    """Euler's method on one picture after another; their patch sizes by row and step."""
    images = []
    for row, label in enumerate(classes):
        noise = generator_for(seed, SAMPLING, row, Stream.NOISE)
        z = torch.from_numpy(noise.standard_normal((1, 8, 8), dtype="float32")).unsqueeze(0)
        for step in range(num_steps):
            sigma = 1 - step / num_steps
            with_class, without = (
                model(z, sigma, torch.tensor([own]), scale=scale_of(row, step))
                for own in (label, 10)
            )
            z = z - (without + guidance * (with_class - without)) / num_steps
        images.append(z)
    return torch.cat(images)


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_commands_samples_are_those_of_a_loop(images_run: Path, tmp_path: Path) -> None:
    averaged = load_run_dit(images_run, average=True)
    drawn, said = _draw(images_run, tmp_path)
    assert (drawn.shape, drawn.dtype) == ((10, 1, 8, 8), torch.float32)
    _assert_same(drawn, _by_hand(averaged, list(range(10))))
    assert "100% of the tokens" in said
    other_seed, _ = _draw(images_run, tmp_path, "--seed", "5", "--classes", "4,7", "--rows", "2")
    _assert_same(other_seed, _by_hand(averaged, [4, 7, 4, 7], seed=5))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 10 + 2, 2 * 10 + 2)
    coarse, said = _draw(images_run, tmp_path, "--scale", "2", "--num-steps", "3", "--rows", "1")
    _assert_same(coarse, _by_hand(averaged, list(range(10)), num_steps=3, scale_of=lambda *_: 2))
    assert "25% of the tokens" in said
    plain, _ = _draw(images_run, tmp_path, "--no-ema", "--guidance", "1", "--classes", "3")
    weights = load_run_dit(images_run, average=False)
    _assert_same(plain, _by_hand(weights, [3], guidance=1.0))
    assert not torch.allclose(plain, _by_hand(averaged, [3], guidance=1.0), atol=1e-2)


def test_the_grid_at_the_end_of_a_run_is_that_of_the_averaged_weights(
    images_run: Path, tmp_path: Path
) -> None:
    _draw(images_run, tmp_path, "--seed", "7")  # the run's own
    drawn = (tmp_path / "grid.png").read_bytes()
    assert drawn == (images_run / "samples.png").read_bytes()
    _draw(images_run, tmp_path, "--seed", "7", "--no-ema")
    assert drawn != (tmp_path / "grid.png").read_bytes()


def test_solvers(images_run: Path, tmp_path: Path) -> None:
    """Both reach the same pictures with many steps; noise makes others."""
    few = ["--classes", "1", "--rows", "3", "--guidance", "1"]
    exact, _ = _draw(images_run, tmp_path, *few, "--num-steps", "60", "--solver", "heun")
    errors = {}
    for solver in ("euler", "heun", "ancestral"):
        drawn, _ = _draw(images_run, tmp_path, *few, "--num-steps", "10", "--solver", solver)
        errors[solver] = float((drawn - exact).square().mean())
    assert errors["heun"] < 0.3 * errors["euler"] < 0.03 * errors["ancestral"]


class Mixed:
    """Images by turns at both sizes, which change places at every step."""

    sizes = (1, 2)

    def first(self, num_samples: int, device: torch.device | str = "cpu") -> PatchDecision:
        return self._sizes(num_samples, 0)

    def decide(
        self, previous: PatchDecision, *_: object, step: int, num_steps: int
    ) -> PatchDecision:
        return self._sizes(len(previous.scale_B), step)

    def _sizes(self, num_samples: int, step: int) -> PatchDecision:
        scale_B = torch.tensor([self.of(row, step) for row in range(num_samples)])
        return PatchDecision(scale_B, scale_B, scale_B.double().unsqueeze(1))

    @staticmethod
    def of(row: int, step: int) -> int:
        return 1 + (row + step) % 2


def test_an_image_is_the_same_in_any_company(images_run: Path) -> None:
    """Of images of other classes, at other patch sizes."""
    config = load_image_config(images_run / "config.toml")
    model = load_run_dit(images_run, average=True)
    classes = class_columns(config, [2, 5, 8], 2)
    settings = config.samples
    whole = sample(model, config, classes, settings=settings, seed=3, policy=Mixed())
    _assert_same(whole.images, _by_hand(model, classes.tolist(), seed=3, scale_of=Mixed.of))
    assert whole.record.tokens_KB.float().std(1).min() > 0  # in every step
    part = sample(model, config, classes[:2], settings=settings, seed=3, policy=Mixed())
    _assert_same(part.images, whole.images[:2])


def test_an_image_is_the_same_in_any_company_with_a_cache(images_run: Path) -> None:
    """Each decides for itself what is computed, whatever its neighbours change."""
    config = load_image_config(images_run / "config.toml")
    model = load_run_dit(images_run, average=True)
    classes = class_columns(config, [2, 5, 8], 2)
    settings = config.samples.model_copy(update={"cache": 0.3, "num_steps": 20})
    for policy in (None, Mixed()):
        whole = sample(model, config, classes, settings=settings, seed=3, policy=policy)
        part = sample(model, config, classes[:2], settings=settings, seed=3, policy=policy)
        _assert_same(part.images, whole.images[:2])
        # A row that changes its size in every step never has anything to reuse.
        assert (whole.computed == 1) is (policy is not None)


def test_the_cache_skips_calls_and_costs_little(images_run: Path, tmp_path: Path) -> None:
    long = ["--num-steps", "30", "--classes", "0,1,2"]
    plain, said = _draw(images_run, tmp_path, *long)
    assert "skipped" not in said
    cached, said = _draw(images_run, tmp_path, *long, "--cache", "0.3")
    found = re.search(r"the cache skipped (\d+)% of the calls", said)
    assert found is not None
    assert 20 < int(found[1]) < 95
    error = (cached - plain).square().mean() / plain.square().mean()
    assert 0 < error < 0.05, error


def test_patch_sizes_that_follow_the_path(images_run: Path, tmp_path: Path) -> None:
    """The calibrated threshold, given by hand, draws the same; --scale sets it aside."""
    long = ["--num-steps", "30", "--classes", "0,1,2"]
    calibrated, said = _draw(images_run, tmp_path, *long, "--calibrate", "0.6")
    found = re.search(r"tau (\S+)\nwrote .*; (\d+)% of the tokens", said)
    assert found is not None
    assert 30 < int(found[2]) < 95
    config = load_image_config(images_run / "config.toml")
    by_tau, said = _draw(images_run, tmp_path, *long, "--tau", found[1])
    assert abs(int(said.split("; ")[1].split("%")[0]) - int(found[2])) < 15  # tau was rounded
    assert by_tau.shape == calibrated.shape
    fine, _ = _draw(images_run, tmp_path, *long)
    assert not torch.equal(fine, calibrated)
    zero, said = _draw(images_run, tmp_path, *long, "--tau", "0")
    assert torch.equal(zero, fine)
    _check_that_scale_comes_first(images_run, tmp_path, config)


def _check_that_scale_comes_first(run_dir: Path, root: Path, config: ImageRunConfig) -> None:
    with_tau = root / "run"
    with_tau.mkdir()
    (with_tau / "checkpoints").symlink_to(run_dir / "checkpoints")
    text = (run_dir / "config.toml").read_text()
    assert config.samples.tau == 0
    (with_tau / "config.toml").write_text(text.replace("\ntau = 0.0\n", "\ntau = 100.0\n"))
    long = ["--num-steps", "20", "--classes", "3"]
    _, said = _draw(with_tau, root, *long)
    # Three steps at the beginning and five at the end are at the base patch.
    assert f"{(8 + 12 / 4) / 20:.0%} of the tokens" in said
    assert "100% of the tokens" in _draw(with_tau, root, *long, "--scale", "1")[1]
    assert "25% of the tokens" in _draw(with_tau, root, *long, "--scale", "2")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "1,10"], "class 10 does not exist: the model knows 0 to 9"),
        (["--classes", "one"], "'one' is no list of numbers"),
        (["--embeddings", "a"], 'the model takes none .model.condition="class"'),
        (["--solver", "dpm"], "--solver dpm is none of euler, heun, ancestral"),
        (["--scale", "4"], "--scale 4: the model was trained with patch scales 1, 2"),
        (["--scale", "2", "--tau", "0.1"], "--scale and --tau each choose patch sizes"),
        (["--calibrate", "0.5", "--tau", "0.1"], "--tau and --calibrate each choose"),
        (["--calibrate", "1.0"], r"1.0 of 8 steps is step 8; it must be one from 3 to 7"),
        (["--calibrate", "0.1"], "0.1 of 8 steps is step 1"),
        (["--device", "abacus"], "'abacus' is not a device"),
    ],
)
def test_options_that_cannot_be(
    images_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _draw(images_run, tmp_path, *options)
    assert not (tmp_path / "grid.png").exists()


def test_places_that_cannot_be_written_and_what_is_no_run(images_run: Path, tmp_path: Path) -> None:
    def fails(kind: type[TrinityError], message: str, *arguments: str | Path) -> None:
        done = CliRunner().invoke(app, ["sample-images", *map(str, arguments)])
        assert isinstance(done.exception, kind)
        assert message in str(done.exception)

    (tmp_path / "file").write_text("")
    few = ["--num-steps", "1", "--classes", "1", "--rows", "1"]
    fails(
        DataError, "cannot write the picture", images_run, *few, "--output", tmp_path / "file/a.png"
    )
    output = ["--output", tmp_path / "grid.png"]
    fails(
        DataError, "cannot write the samples", images_run, *few, *output, "--save",
        tmp_path / "file/a",
    )  # fmt: skip
    fails(ConfigError, "is not a run directory", tmp_path, *output)


def test_models_without_classes(tiny_images_toml: Path, tmp_path: Path) -> None:
    """By embeddings, videos; and a single patch size has nothing to calibrate."""
    latents = {"latents": torch.randn(20, 1, 2, 8, 8), "embeddings": torch.randn(20, 3)}
    save_file(latents, tmp_path / "clips.safetensors")
    overrides = [
        f"images.sources=[{{name='c', format='latents', path='{tmp_path / 'clips.safetensors'}'}}]",
        *("images.frames=2", "model.num_axes=3", "samples.columns=4", "samples.rows=2"),
        *("model.condition=embedding", "model.num_classes=0", "model.embedding_width=3"),
        *("train.num_steps=1", "schedule.warmup_steps=0", "schedule.decay_steps=0"),
        *("model.patch_scales=[1]", "images.coarse_shares=[]", "train.validate_every_steps=0"),
    ]
    run_dir = tmp_path / "run"
    assert pretrain_command([str(tiny_images_toml), *overrides], run_dir, None) == 0
    drawn, _ = _draw(run_dir, tmp_path)
    assert drawn.shape == (8, 1, 2, 8, 8)
    _check_embeddings(run_dir, tmp_path, drawn)
    with pytest.raises(ConfigError, match=r'classes \[3\] are asked for.*condition="embedding"'):
        _draw(run_dir, tmp_path, "--classes", "3")
    with pytest.raises(ConfigError, match="leaves no choice"):
        _draw(run_dir, tmp_path, "--calibrate", "0.5")
    assert "100% of the tokens" in _draw(run_dir, tmp_path, "--tau", "0.5")[1]


def _check_embeddings(run_dir: Path, root: Path, unconditional: Tensor) -> None:
    """Columns of the grid from a file; zeros are no condition."""
    path = root / "prompts.safetensors"
    embeddings = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
    save_file({"embeddings": embeddings.half()}, path)
    drawn, _ = _draw(run_dir, root, "--embeddings", str(path))
    assert drawn.shape == (4, 1, 2, 8, 8)
    model = load_run_dit(run_dir, average=True)
    config = load_image_config(run_dir / "config.toml")
    by_hand = sample(model, config, embeddings.repeat(2, 1), settings=config.samples, seed=0)
    assert torch.equal(drawn, by_hand.images)
    # After one step an embedding hardly tells; the first row's are those of no condition.
    torch.testing.assert_close(drawn[0], unconditional[0])
    for tensors, message in (
        ({"prompts": embeddings}, 'pass safetensors with "embeddings"'),
        (
            {"embeddings": embeddings[:, :2].contiguous()},
            r"shape \(2, 2\); the model takes",
        ),
        ({"embeddings": embeddings / 0}, "not finite"),
    ):
        save_file(tensors, path)
        with pytest.raises(DataError, match=message):
            _draw(run_dir, root, "--embeddings", str(path))
    with pytest.raises(DataError, match="pass safetensors"):
        _draw(run_dir, root, "--embeddings", str(root / "nothing"))
