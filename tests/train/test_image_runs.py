"""Whole runs of a diffusion transformer: what they leave behind, and that nothing disturbs them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.train.poison import GOES_BACK
from tests.train.poison import train as train_poisoned
from tools.ranks import on_ranks
from trinity.ckpt.load import load_run_dit
from trinity.ckpt.store import latest_checkpoint, load_tensors, stored_names
from trinity.cli import app
from trinity.core.batch import FlowBatch
from trinity.core.errors import ConfigError, DataError, TrinityError
from trinity.core.load_config import load_image_config
from trinity.models.dit import DiffusionTransformer
from trinity.train.command import pretrain_command
from trinity.train.interventions import read_interventions
from trinity.train.metrics import read_metrics
from trinity.train.streams import make_loader, next_batch, open_dataset

TIMING_KEYS = {"time", "tokens_per_s", "step_s", "mfu", "peak_memory_bytes", "rank_ms"}
SHORT = ["train.num_steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=0"]
EXACT = ["train.precision=fp64", "optim.muon.dtype=fp64"]


def _trinity(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def _stored(run_dir: Path) -> dict[str, Tensor]:
    found, rejected = latest_checkpoint(run_dir)
    assert found is not None
    assert not rejected
    return load_tensors(found, stored_names(found))


def _assert_same_end(one: Path, other: Path) -> None:
    ours, theirs = _stored(one), _stored(other)
    assert ours.keys() == theirs.keys()
    kinds = {"model", "optim", "data", "judge", "ema", "rng"}
    assert {name.split(".")[0] for name in ours} == kinds
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()), name


def _curve(run_dir: Path) -> list[dict[str, object]]:
    rows = [row for row in read_metrics(run_dir) if row["kind"] not in ("checkpoint", "event")]
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def _copy(run_dir: Path, target: Path, *, until_step: int) -> Path:
    """A run as it was when it was killed soon after a checkpoint."""
    shutil.copytree(run_dir, target)
    for path in (target / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > until_step:
            shutil.rmtree(path)
    (target / "checkpoints/latest").write_text(f"step-{until_step:08d}\n")
    for name in ("DONE", "samples.png"):
        (target / name).unlink()
    return target


def _batches(run_dir: Path, num_steps: int) -> list[FlowBatch]:
    config = load_image_config(run_dir / "config.toml")
    loader = make_loader(config, open_dataset(config))
    batches = [next_batch(config, loader, config.batch.rows_per_step) for _ in range(num_steps)]
    return [batch for batch in batches if isinstance(batch, FlowBatch)]


def test_what_a_run_leaves_behind(images_run: Path) -> None:
    assert (images_run / "DONE").read_text() == "12\n"
    record = json.loads((images_run / "run.json").read_text())
    (source,) = record["sources"]
    assert (source["num_classes"], sum(source["num_images"].values())) == (10, 1797)
    with Image.open(images_run / "samples.png") as picture:
        assert picture.size == (10 * (8 + 2) + 2, 8 + 2 + 2)  # ten classes, a row of each
    losses = [row["loss"] for row in read_metrics(images_run, "validation")]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]
    assert not (images_run / "tokenizer").exists()


def test_metrics_are_those_of_the_batches(images_run: Path) -> None:
    """The first loss is the velocities' own size; loads are counted by range of sigma."""
    rows = read_metrics(images_run, "train")
    batches = _batches(images_run, len(rows))
    square_BS = batches[0].targets_BSP.double().square().sum(-1)
    first_loss = float((square_BS * batches[0].share_BS).sum() / batches[0].num_counted)
    assert rows[0]["loss"] == pytest.approx(first_loss, rel=1e-6)
    for row, batch in zip(rows, batches, strict=True):
        tokens_of_image_BN = (
            batch.document_ids_BS[:, :, None] == torch.arange(batch.sigma_BN.shape[1])
        ).sum(1)
        expected = [0] * 4
        for sigma, tokens in zip(
            batch.sigma_BN.flatten().tolist(), tokens_of_image_BN.flatten().tolist(), strict=True
        ):
            expected[min(int(sigma * 4), 3)] += 2 * tokens  # every token visits two experts
        assert len(row["load_by_sigma"]) == 2
        for load_UE, load_E in zip(row["load_by_sigma"], row["load"], strict=True):
            assert [sum(load) for load in load_UE] == expected
            assert [sum(own) for own in zip(*load_UE, strict=True)] == load_E
        assert "z" not in row
        assert row["num_tokens_seen"] == row["step"] * 4 * 42


def test_a_run_that_was_killed_ends_as_one_that_was_not(images_run: Path, tmp_path: Path) -> None:
    victim = _copy(images_run, tmp_path / "victim", until_step=8)
    assert pretrain_command([], None, victim) == 0
    assert _curve(victim) == _curve(images_run)
    _assert_same_end(victim, images_run)
    assert (victim / "samples.png").read_bytes() == (images_run / "samples.png").read_bytes()


def test_the_split_into_microbatches_changes_nothing(
    tiny_images_toml: Path, tmp_path: Path
) -> None:
    """Of 4, 2 and 1 rows, which hold different numbers of images: every image counts alike."""
    ends = []
    overrides = [*SHORT, *EXACT, "flow.weighting=cosmap", "train.validate_every_steps=0"]
    for size in (4, 2, 1):
        more = [f"batch.microbatch_rows={size}", "balance.sequence_loss=0"]
        directory = tmp_path / f"of{size}"
        assert pretrain_command([str(tiny_images_toml), *overrides, *more], directory, None) == 0
        ends.append((_stored(directory), [r["loss"] for r in read_metrics(directory, "train")]))
        norm = read_metrics(directory, "train")[0]["grad_norm"]
        assert norm == pytest.approx(_first_gradient_norm(directory), rel=1e-6)  # shares are fp32
    (whole, losses), *others = ends
    for stored, own_losses in others:
        assert own_losses == pytest.approx(losses, rel=1e-12)
        for name, tensor in whole.items():
            if name.startswith(("model.", "ema.", "optim.")):
                torch.testing.assert_close(
                    stored[name], tensor, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


def _first_gradient_norm(run_dir: Path) -> float:
    """Of the mean over all images of a step of their errors, each weighted by its sigma."""
    config = load_image_config(run_dir / "config.toml")
    model = DiffusionTransformer.initialized(config.model, seed=config.seed).double()
    (batch,) = _batches(run_dir, 1)
    given = dict(zip(batch._fields[1:], batch[1:], strict=True))
    hidden_BSD = model.before_head(model.run_blocks(model.enter(batch[0], given), given), given)
    assert model.patch_head is not None
    error_BS = (model.patch_head(hidden_BSD, batch.scale_BS) - batch.targets_BSP).square().sum(-1)
    last = batch.sigma_BN.shape[1] - 1
    sigma_BS = batch.sigma_BN.double().gather(1, batch.document_ids_BS.long().clamp(max=last))
    weight_BS = 2 / (math.pi * (1 - 2 * sigma_BS + 2 * sigma_BS**2))  # cosmap
    is_image_BS = batch.document_ids_BS <= last
    mean_BS = error_BS * weight_BS * is_image_BS / (8 * 8)
    (mean_BS.sum() / batch.num_counted).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.cat(gradients).norm())


def test_a_rewound_run_ends_as_one_that_never_saw_the_images(
    tiny_images_toml: Path, tmp_path: Path
) -> None:
    train_poisoned(tiny_images_toml, tmp_path / "rewound", GOES_BACK, range(80, 96))
    (entry,) = read_interventions(tmp_path / "rewound")
    assert entry.first_row <= 80 < 96 <= entry.end_row
    plain = ["train.num_steps=28", f"images.skip_rows=[[{entry.first_row},{entry.end_row}]]"]
    train_poisoned(tiny_images_toml, tmp_path / "clean", plain, range(80, 96))
    _assert_same_end(tmp_path / "rewound", tmp_path / "clean")


def test_a_pipeline_trains_validates_and_draws_as_one_process_does(
    tiny_images_toml: Path, tmp_path: Path
) -> None:
    """Six images to validate on, two to a row: the last of its two batches is half empty."""
    overrides = [*SHORT, *EXACT, "train.validation_rows=3", "train.validate_every_steps=1"]
    given = [str(tiny_images_toml), *overrides]
    assert pretrain_command(given, tmp_path / "alone", None) == 0
    on_ranks(2, pretrain_command, [*given, "parallel.pp=2"], tmp_path / "piped", None)
    for kind in ("validation", "train"):
        losses, others = (
            [row["loss"] for row in read_metrics(tmp_path / name, kind)]
            for name in ("alone", "piped")
        )
        assert len(losses) == (3 if kind == "validation" else 2)
        assert others == pytest.approx(losses, rel=1e-11)
    one, other = (load_run_dit(tmp_path / name, average=True) for name in ("alone", "piped"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)
    pictures = []
    for name in ("alone", "piped"):
        with Image.open(tmp_path / name / "samples.png") as picture:
            pictures.append(np.asarray(picture, dtype=int))
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_data_verbs(images_run: Path, tiny_images_toml: Path, tmp_path: Path) -> None:
    built = _trinity("data", "build", tiny_images_toml)
    fingerprint = json.loads((images_run / "run.json").read_text())["data_fingerprint"]
    assert f"fingerprint {fingerprint}" in built
    assert '"num_classes": 10' in built
    lines = _trinity("data", "show-step", images_run, "4").splitlines()
    assert {line.split(":")[0] for line in lines} == {f"row {i}" for i in range(12, 16)}
    assert len(lines) == int(_batches(images_run, 4)[-1].num_counted)
    assert {line.split(" ")[2] for line in lines} == {"digits"}
    assert {line[-1] for line in lines} == {"1", "2"}  # patch scales
    copy = _copy(images_run, tmp_path / "copy", until_step=8)
    said = _trinity("data", "skip", copy, "9", "10", "--reason", "ugly digits")
    assert "rows 32..39 are never trained on" in said
    assert pretrain_command([], None, copy) == 0
    after = _trinity("data", "show-step", copy, "9").splitlines()
    assert {line.split(":")[0] for line in after} == {f"row {i}" for i in range(40, 44)}
    assert read_metrics(copy, "train")[-1]["next_row"] == 56
    assert _curve(copy)[-1] != _curve(images_run)[-1]


def _pictures(root: Path) -> str:
    """A folder of two classes."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = root / "pictures" / ("ab"[number % 2]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
    return f"{{name='own', format='folder', path='{root / 'pictures'}'}}"


def _parquet(root: Path) -> str:
    _pictures(root)
    files = sorted((root / "pictures").rglob("*.png"))
    table = {
        "picture": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "kind": [file.parent.name for file in files],
    }
    pq.write_table(pa.table(table), root / "own.parquet")
    keys = "image_key='picture', label_key='kind'"
    return f"{{name='own', format='parquet', path='{root / 'own.parquet'}', {keys}}}"


def _clips(root: Path) -> str:
    """Video latents with embeddings."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "latents": torch.randn(24, 2, 4, 8, 8, generator=generator),
        "embeddings": torch.randn(24, 5, generator=generator),
    }
    save_file(tensors, root / "clips.safetensors")
    return f"{{name='own', format='latents', path='{root / 'clips.safetensors'}'}}"


COLOUR = ["model.channels=3", "images.held_out_fraction=0.3"]
VIDEO = [
    "model.channels=2",
    "model.num_axes=3",
    "model.patch_frames=2",
    "model.condition=embedding",
    "model.num_classes=0",
    "model.embedding_width=5",
    "images.frames=4",
    "images.held_out_fraction=0.3",
    "samples.columns=3",
]


@pytest.mark.parametrize(
    ("make", "overrides"),
    [
        (_pictures, [*COLOUR, "images.flip=true", "images.decode_threads=2"]),
        (_parquet, [*COLOUR, "model.num_classes=2", "images.sources.0.crop=random"]),
        (_clips, VIDEO),
        (_clips, [*VIDEO, "model.condition=none", "model.embedding_width=0"]),
    ],
    ids=["folder", "parquet", "videos", "videos without condition"],
)
def test_runs_on_files_of_ones_own(
    tiny_images_toml: Path, tmp_path: Path, make: Any, overrides: list[str]
) -> None:
    sources = f"images.sources=[{make(tmp_path)}]"
    arguments = [str(tiny_images_toml), *SHORT, sources, *overrides]
    assert pretrain_command(arguments, tmp_path / "run", None) == 0
    (record,) = json.loads((tmp_path / "run/run.json").read_text())["sources"]
    assert sum(record["num_images"].values()) == (24 * 64 if "random" in str(overrides) else 24)
    assert [row["accepted"] for row in read_metrics(tmp_path / "run", "train")] == [True, True]
    assert {"own", "loss"} <= read_metrics(tmp_path / "run", "validation")[-1].keys()
    with Image.open(tmp_path / "run/samples.png") as picture:
        frames, columns = (4, 3) if make is _clips else (1, 10)
        columns = 2 if "model.num_classes=2" in overrides else columns
        assert picture.size == (columns * (8 * frames + 2) + 2, 12)


def _damaged_pictures(root: Path) -> str:
    source = _pictures(root)
    (root / "pictures/a/2.png").write_bytes(b"no picture")
    return source


def _cut_clips(root: Path) -> str:
    source = _clips(root)
    path = root / "clips.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return source


@pytest.mark.parametrize(
    ("make", "overrides", "kind", "message"),
    [
        (_pictures, [*COLOUR, "model.num_classes=1"], ConfigError, "num_classes=1, .* 2 classes"),
        (_pictures, ["model.channels=2"], DataError, "1 or 3 channels, but model.channels=2"),
        (_pictures, [*COLOUR, "images.sources.0.path=x"], DataError, "path='x' is no directory"),
        (_damaged_pictures, COLOUR, DataError, r"a/2\.png cannot be decoded"),
        (_clips, [*VIDEO, "model.embedding_width=4"], ConfigError, "width=4, .* of width 5"),
        (_clips, [*VIDEO, "images.frames=2"], DataError, r"ask for \(2, 2, 8, 8\)"),
        (
            _clips,
            [*VIDEO, "model.embedding_width=0", "model.condition=class", "model.num_classes=3"],
            ConfigError,
            "have embeddings instead of classes",
        ),
        (_cut_clips, VIDEO, DataError, "is no whole safetensors file"),
        (_clips, [*VIDEO, "images.held_out_fraction=0.0"], DataError, "no held-out image"),
        (_clips, [*VIDEO, "images.coarse_shares=[1]"], ConfigError, "one number for each of"),
        (_clips, [*VIDEO, "images.skip_rows=[[1,4]]"], DataError, r"multiples of images\.lanes=2"),
    ],
)
def test_what_does_not_fit_ends_a_run_before_it_begins(
    tiny_images_toml: Path,
    tmp_path: Path,
    make: Any,
    overrides: list[str],
    kind: type[TrinityError],
    message: str,
) -> None:
    sources = f"images.sources=[{make(tmp_path)}]"
    arguments = [str(tiny_images_toml), *SHORT, sources, *overrides]
    with pytest.raises(kind, match=message):
        pretrain_command(arguments, tmp_path / "run", None)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_picture_found_damaged_on_the_way_can_be_passed_over(
    tiny_images_toml: Path, tmp_path: Path
) -> None:
    source = _pictures(tmp_path)
    picture = tmp_path / "pictures/b/5.png"
    picture.write_bytes(picture.read_bytes()[:200])  # its header is whole
    overrides = [*COLOUR, f"images.sources=[{source}]", "images.coarse_shares=[]"]
    overrides += [*SHORT, "train.num_steps=4", "checkpoint.every_steps=1", "batch.rows_per_step=2"]
    run_dir = tmp_path / "run"
    with pytest.raises(DataError, match=r"row 3 of the stream: .*b/5\.png cannot be decoded"):
        pretrain_command([str(tiny_images_toml), *overrides], run_dir, None)
    said = _trinity("data", "skip", run_dir, "2", "2")  # of two rows each
    assert "rows 2..3 are never trained on" in said
    assert pretrain_command([], None, run_dir) == 0
    assert read_metrics(run_dir, "train")[-1]["next_row"] == 10


def test_a_run_whose_samples_cannot_be_made_is_finished_all_the_same(
    images_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _copy(images_run, tmp_path / "copy", until_step=8)
    (copy / "samples.png").mkdir()
    assert pretrain_command([], None, copy) == 0
    assert (copy / "DONE").exists()
    assert "no samples: " in capsys.readouterr().out
