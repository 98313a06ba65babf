"""The judge of samples: what it learns, how it orders spoilt images, and its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from trinity.core.errors import ConfigError, DataError
from trinity.core.images_config import ImagesConfig
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import ImageDataset, build_images
from trinity.train import feature_network as module
from trinity.train.feature_network import (
    FeatureNetwork,
    compare_sets,
    feature_network,
    labelled_images,
    train_feature_network,
)
from trinity.train.quality import frechet_distance, kernel_distance, sliced_wasserstein


def _digits(size: int = 16) -> ImageDataset:
    config = ImagesConfig.model_validate(
        {
            "sources": [{"name": "digits", "format": "digits"}],
            "height": size,
            "width": size,
            "held_out_fraction": 0.2,
        }
    )
    return build_images(config, channels=1, seed=0)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return _digits()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def network(digits: ImageDataset, cache: Path) -> FeatureNetwork:
    return feature_network(digits, cache)


def _spoilt(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return {
        "real": images,
        "faint noise": images + 0.2 * noise,
        "noise": images + 0.5 * noise,
        "blurred": F.avg_pool2d(images, 3, 1, 1, count_include_pad=False),
        "half the classes": images[labels < 5],
        "pure noise": noise,
    }


def test_held_out_digits_are_told_apart(digits: ImageDataset, network: FeatureNetwork) -> None:
    assert network.held_out_accuracy >= 0.97
    images, labels = labelled_images(digits, HELD_OUT, 10_000)
    assert network.class_accuracy(images, labels) == network.held_out_accuracy
    wrong = (labels + 1) % 10
    assert network.class_accuracy(images, wrong) <= 1 - network.held_out_accuracy


def test_spoilt_digits_are_put_in_order(digits: ImageDataset, network: FeatureNetwork) -> None:
    """Two halves of the real digits, 898 each; then what the second half may suffer."""
    parts = [labelled_images(digits, split, 10_000) for split in (TRAIN, HELD_OUT)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    one, other = order[:898], order[898:1796]
    sets = _spoilt(images[other], labels[other])
    half = images[one]
    features = network.features(half)
    theirs = {name: network.features(spoilt) for name, spoilt in sets.items()}
    frechet = {name: frechet_distance(features, own) for name, own in theirs.items()}
    assert sorted(frechet, key=frechet.__getitem__) == list(sets)
    kernel = {name: kernel_distance(features, own) for name, own in theirs.items()}
    assert sorted(kernel, key=kernel.__getitem__)[2:] == list(sets)[2:]
    assert abs(kernel["real"]) < 0.2 * kernel["noise"]
    # Half the classes has half the images: the sliced distance takes sets of unequal size.
    sliced = {name: sliced_wasserstein(half, spoilt) for name, spoilt in sets.items()}
    assert sliced["real"] < 0.6 * sliced["faint noise"]  # what FD hardly sees
    assert sliced["faint noise"] < sliced["blurred"] < sliced["noise"] < sliced["pure noise"]


def test_networks_are_kept_and_found_again(
    digits: ImageDataset, network: FeatureNetwork, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_feature_network", None)  # nothing may be trained again
        again = feature_network(digits, cache)
    assert again.sha256() == network.sha256()
    assert again.held_out_accuracy == network.held_out_accuracy
    monkeypatch.setattr(module, "MIN_STEPS", 2)
    monkeypatch.setattr(module, "MAX_STEPS", 2)
    other_seed = feature_network(digits, cache, seed=1)
    other_data = feature_network(_digits(8), cache)
    fewer = feature_network(digits, cache, max_images=100)
    hashes = {n.sha256() for n in (network, other_seed, other_data, fewer)}
    assert len(hashes) == 4
    assert len(list((cache / "feature-networks").iterdir())) == 4  # and nothing half done


def test_training_is_a_function_of_its_seed_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MIN_STEPS", 3)
    monkeypatch.setattr(module, "MAX_STEPS", 3)
    images, labels = torch.rand(70, 3, 40, 24), torch.arange(70) % 4
    before = torch.get_rng_state()
    networks = [
        train_feature_network(images, labels, num_classes=4, seed=seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert networks[0].sha256() == networks[1].sha256() != networks[2].sha256()
    assert networks[0].features(images).shape == (70, 64)
    assert not any(p.requires_grad for p in networks[0].parameters())


def test_features_of_videos_are_means_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_STEPS", 2)
    monkeypatch.setattr(module, "EVAL_IMAGES", 3)
    videos, labels = torch.randn(5, 2, 3, 8, 8), torch.arange(5) % 2
    network = train_feature_network(videos, labels, num_classes=2)
    by_frame = [network.features(videos[:, :, t]) for t in range(3)]
    torch.testing.assert_close(network.features(videos), torch.stack(by_frame).mean(0))
    assert network.classes(videos).shape == (5,)


def test_all_measures_of_a_set(digits: ImageDataset, network: FeatureNetwork) -> None:
    train, _ = labelled_images(digits, TRAIN, 300)
    held_out, labels = labelled_images(digits, HELD_OUT, 200)
    measures = compare_sets(held_out, held_out, network, labels=labels, train=train)
    assert list(measures) == [
        "frechet_distance",
        "kernel_distance",
        "sliced_wasserstein",
        "class_accuracy",
        "distance_ratio",
        "copied_fraction",
    ]
    assert abs(measures["frechet_distance"]) < 1e-3
    assert measures["sliced_wasserstein"] == 0
    assert measures["class_accuracy"] == network.class_accuracy(held_out, labels)
    assert measures["distance_ratio"] == 1
    copied = compare_sets(train, held_out, network, train=train)
    assert copied["distance_ratio"] == 0
    assert "class_accuracy" not in copied


def test_images_without_classes_cannot_be_judged(
    tmp_path: Path, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([0, -1, 1, -1, 0])
    save_file({"latents": torch.randn(5, 1, 4, 4), "labels": labels}, tmp_path / "some.safetensors")
    values = {"height": 4, "width": 4, "held_out_fraction": 0.0}
    source = {"name": "l", "format": "latents", "path": str(tmp_path)}
    config = ImagesConfig.model_validate({"sources": [source], **values})
    images, known = labelled_images(build_images(config, channels=1, seed=0), TRAIN, 10)
    assert (len(images), sorted(known.tolist())) == (3, [0, 0, 1])
    save_file({"latents": torch.randn(5, 1, 4, 4)}, tmp_path / "some.safetensors")
    with pytest.raises(DataError, match=r"two classes or more; these have 0.*label_key"):
        feature_network(build_images(config, channels=1, seed=0), tmp_path)
    (tmp_path / "feature-networks").write_text("in the way")
    monkeypatch.setattr(module, "MIN_STEPS", 1)
    monkeypatch.setattr(module, "MAX_STEPS", 1)
    with pytest.raises(ConfigError, match="cannot keep"):
        feature_network(digits, tmp_path)
