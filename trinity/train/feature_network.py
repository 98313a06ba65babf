"""A small classifier of the training images, whose features measure samples.

It takes the place of a downloaded network: trained on the spot in seconds, with a fixed seed, on
real images alone, and kept in a file named after them. Distances in its features compare only
between runs that use the same network; :attr:`FeatureNetwork.sha256` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from trinity.core.errors import ConfigError, DataError
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import ImageDataset
from trinity.data.pack import permuted
from trinity.train.quality import (
    frechet_distance,
    kernel_distance,
    memorisation,
    sliced_wasserstein,
)

NETWORK_VERSION = 1
"""Counts changes of the network or of how it is trained."""
NUM_FEATURES = 64
LARGEST_INPUT = 32
"""Larger images are shrunk to this edge first, which keeps the training a matter of seconds."""
BATCH_IMAGES = 64
MIN_STEPS, MAX_STEPS, EPOCHS = 320, 1500, 14
LR, WEIGHT_DECAY, LABEL_SMOOTHING = 8e-3, 0.05, 0.05
EVAL_IMAGES = 512


class FeatureNetwork(nn.Module):
    """Three convolutions, and the mean over positions as 64 features."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 24, 3, stride=2, padding=1)
        self.second = nn.Conv2d(24, 48, 3, padding=1)
        self.third = nn.Conv2d(48, NUM_FEATURES, 3, stride=2, padding=1)
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.held_out_accuracy = float("nan")
        """Share of held-out images whose class it finds."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64), with a gradient."""
        height, width = images.shape[-2:]
        shrink = LARGEST_INPUT / max(height, width)
        if shrink < 1:
            size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        x = F.gelu(self.first(images))
        x = F.gelu(self.second(x))
        if min(x.shape[-2:]) >= 4:
            x = F.max_pool2d(x, 2)
        return F.gelu(self.third(x)).mean((2, 3))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, C, H, W); of videos, the mean over their frames."""
        weight = self.head.weight
        parts = []
        for chunk in images.split(EVAL_IMAGES):
            chunk = chunk.to(weight.device, weight.dtype)
            if chunk.ndim == 5:
                frames = self(chunk.transpose(1, 2).flatten(0, 1))
                parts.append(frames.unflatten(0, (len(chunk), -1)).mean(1))
            else:
                parts.append(self(chunk))
        return torch.cat(parts)

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """The likeliest class of each image, (B,) int64."""
        return self.head(self.features(images)).argmax(1)

    def class_accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that show the class they were asked to."""
        return float((self.classes(images) == labels.to(self.head.weight.device)).double().mean())

    def sha256(self) -> str:
        """Hash of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def train_feature_network(
    images: Tensor, labels: Tensor, *, num_classes: int, seed: int = 0
) -> FeatureNetwork:
    """Train on images (N, C, H, W) or videos and their classes, (N,), on the CPU.

    The same images and seed give the same network on the same machine; no other random state is
    touched.
    """
    if images.ndim == 5:
        labels = labels.repeat_interleave(images.shape[2])
        images = images.transpose(1, 2).flatten(0, 1)
    num_images = len(images)
    steps = min(max(EPOCHS * num_images // BATCH_IMAGES, MIN_STEPS), MAX_STEPS)
    shift = max(1, max(images.shape[-2:]) // 16)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = FeatureNetwork(images.shape[1], num_classes)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < BATCH_IMAGES:
                order = torch.cat([order, torch.randperm(num_images)])
            chosen, order = order[:BATCH_IMAGES], order[BATCH_IMAGES:]
            moved = torch.randint(-shift, shift + 1, (2,)).tolist()
            batch = images[chosen].roll(moved, (-2, -1))
            loss = F.cross_entropy(
                network.head(network(batch)), labels[chosen], label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def feature_network(
    dataset: ImageDataset, cache_dir: Path | str, *, seed: int = 0, max_images: int = 20_000
) -> FeatureNetwork:
    """The network of a data set's classes: read from ``cache_dir``, or trained and put there.

    Trained on at most ``max_images`` training images, its accuracy measured on as many held-out
    ones. Raises DataError where images have no classes, ConfigError where the cache cannot be
    written.
    """
    if dataset.num_classes < 2:
        raise DataError(
            f"measuring samples needs images of two classes or more; these have "
            f"{dataset.num_classes}: name the classes with label_key"
        )
    identity = [NETWORK_VERSION, dataset.fingerprint, seed, max_images]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = Path(cache_dir) / "feature-networks" / f"{key}.safetensors"
    if not path.is_file():
        _publish(path, *_trained(dataset, seed, max_images))
    with safe_open(path, framework="pt") as handle:
        recorded = json.loads(handle.metadata()["trinity"])
    tensors = load_file(path)
    network = FeatureNetwork(tensors["first.weight"].shape[1], dataset.num_classes)
    network.load_state_dict(tensors)
    network.held_out_accuracy = recorded["held_out_accuracy"]
    return network.eval().requires_grad_(False)


def labelled_images(dataset: ImageDataset, split: str, max_images: int) -> tuple[Tensor, Tensor]:
    """At most ``max_images`` random images of a split, and their classes, without unlabelled ones.

    All in memory: (N, C, H, W) or (N, C, T, H, W) float32, and (N,) int64. The choice is fixed.
    """
    size = dataset.num_images(split)
    chosen = [dataset.read(split, permuted(i, size, 1)) for i in range(min(size, max_images))]
    known = [(pixels, label) for pixels, label in chosen if isinstance(label, int) and label >= 0]
    if not known:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.stack([p for p, _ in known]), torch.tensor([label for _, label in known])


def compare_sets(
    samples: Tensor,
    reference: Tensor,
    network: FeatureNetwork,
    *,
    labels: Tensor | None = None,
    train: Tensor | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All measures of a set of samples, by name.

    Args:
        samples: images or videos to judge.
        reference: real ones, held-out ones best; as many as samples, see :mod:`.quality`.
        network: of the data set.
        labels: classes the samples were asked to show; adds ``class_accuracy``.
        train: images the model was trained on; adds ``distance_ratio`` and ``copied_fraction``,
            measured in pixels.
        seed: of the directions of the sliced distance.
    """
    ours, theirs = network.features(samples), network.features(reference)
    measures = {
        "frechet_distance": frechet_distance(ours, theirs),
        "kernel_distance": kernel_distance(ours, theirs),
        "sliced_wasserstein": sliced_wasserstein(samples, reference, seed=seed),
    }
    if labels is not None:
        measures["class_accuracy"] = network.class_accuracy(samples, labels)
    if train is not None:
        measures |= memorisation(samples, train, reference)._asdict()
    return measures


def _trained(dataset: ImageDataset, seed: int, max_images: int) -> tuple[FeatureNetwork, float]:
    images, labels = labelled_images(dataset, TRAIN, max_images)
    network = train_feature_network(images, labels, num_classes=dataset.num_classes, seed=seed)
    images, labels = labelled_images(dataset, HELD_OUT, max_images)
    accuracy = network.class_accuracy(images, labels) if len(labels) else float("nan")
    return network, accuracy


def _publish(path: Path, network: FeatureNetwork, accuracy: float) -> None:
    """Write aside and rename: of several processes, each leaves a whole file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    recorded: dict[str, Any] = {"held_out_accuracy": accuracy}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), temporary, {"trinity": json.dumps(recorded)})
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot keep the feature network: {error}; free space or set images.cache_dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
