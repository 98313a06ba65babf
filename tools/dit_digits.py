"""How well a small diffusion transformer learns digits: trains one, and judges what it draws.

Trains ``configs/dit_tiny.toml`` on one thread, counting CPU seconds; draws as many digits as there
are held-out ones, and more, and has them judged by a classifier trained on real digits alone.

    python -m tools.dit_digits --save        # the numbers and the picture of the README
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trinity.ckpt.load import load_run_dit
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.load_config import load_image_config
from trinity.core.run_files import CONFIG_FILE
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import build_images
from trinity.train.feature_network import compare_sets, feature_network, labelled_images
from trinity.train.loop import pretrain
from trinity.train.metrics import read_metrics
from trinity.train.picture import save_grid
from trinity.train.run import create_run_directory
from trinity.train.sample_conditions import class_columns
from trinity.train.sample_images import sample

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/dit_tiny.toml"
RESULTS = ROOT / "tools/bench/results/dit_digits.json"
PICTURE = ROOT / "docs/images/dit-digits.png"
SAMPLES_PER_CLASS = 90
"""In all as many as the measures ask for; see :mod:`trinity.train.quality`."""
PICTURE_ROWS, ENLARGE = 6, 3


def train(config: ImageRunConfig, directory: Path) -> dict[str, Any]:
    """Train to the end; the CPU time that took, saving and validating included."""
    create_run_directory(directory, config)
    before, began = time.process_time(), time.monotonic()
    run = pretrain(config, directory, torch.device("cpu"))
    return {
        "steps": run.step,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "cpu_minutes": (time.process_time() - before) / 60,
        "wall_minutes": (time.monotonic() - began) / 60,
    }


def judge(directory: Path, *, samples_per_class: int, picture: Path | None) -> dict[str, Any]:
    """Measures of the samples of a finished run, and of as many real digits as a yardstick."""
    config = load_image_config(directory / CONFIG_FILE)
    dataset = build_images(config.images, channels=config.model.channels, seed=config.seed)
    network = feature_network(dataset, config.images.cache_dir)
    images, labels = labelled_images(dataset, TRAIN, 1 << 30)
    held_out, _ = labelled_images(dataset, HELD_OUT, 1 << 30)
    classes = class_columns(config, range(config.model.num_classes), samples_per_class)
    model = load_run_dit(directory, average=True)
    drawn = sample(model, config, classes, settings=config.samples, seed=1).images
    if picture is not None:
        columns = config.model.num_classes
        save_grid(picture, drawn[: PICTURE_ROWS * columns], columns=columns, enlarge=ENLARGE)
    half = min(len(drawn), len(images) // 2)
    return {
        "samples": len(drawn),
        "classifier_held_out_accuracy": network.held_out_accuracy,
        "classifier": network.sha256(),
        **compare_sets(drawn[:half], images[:half], network, labels=classes[:half]),
        "class_accuracy": network.class_accuracy(drawn, classes),
        "real_half": compare_sets(images[-half:], images[:half], network, labels=labels[-half:]),
        "memorisation": {
            key: value
            for key, value in compare_sets(
                drawn[: len(held_out)], held_out, network, train=images
            ).items()
            if key in ("distance_ratio", "copied_fraction")
        },
        "validation_loss": [row["loss"] for row in read_metrics(directory, "validation")][-1],
    }


def main() -> None:
    """Train, judge, print; save where asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, key=value")
    parser.add_argument("--run", type=Path, help="judge this finished run instead of training")
    parser.add_argument("--keep", type=Path, help="train in this directory")
    parser.add_argument("--samples", type=int, default=SAMPLES_PER_CLASS, help="of each class")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--save", action="store_true", help="keep numbers and picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.run
        if directory is None:
            config = load_image_config(CONFIG, ["train.num_threads=1", *options.overrides])
            directory = options.keep or Path(scratch) / "run"
            record |= train(config, directory)
        picture = options.picture or (PICTURE if options.save else None)
        record |= judge(directory, samples_per_class=options.samples, picture=picture)
    print(json.dumps(record, indent=2))
    if options.save:
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
