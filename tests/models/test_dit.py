"""The diffusion transformer: what it shares with the language model, and what it adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.dit_cases import CONFIG, IMAGE, PATTERN, SHAPE, fp64_model
from trinity.core.batch import FlowBatch
from trinity.core.dit_config import DiTConfig
from trinity.core.errors import ConfigError
from trinity.core.load_config import load_image_config
from trinity.core.model_config import ModelConfig
from trinity.models.dit import DiffusionTransformer
from trinity.models.lm import LanguageModel
from trinity.models.patching import patch_centres, patchify
from trinity.nn.block import Block
from trinity.nn.modulation import NUM_MODULATIONS, Conditioning
from trinity.nn.rope import image_rope_tables, rope_tables
from trinity.ops.image_attention import Sight

ROOT = Path(__file__).resolve().parents[2]


def _images(num: int, *, size: tuple[int, ...] = (8, 12)) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, CONFIG.channels, *size, generator=generator, dtype=torch.float64)


def _packed(z: Tensor, v: Tensor, scales: list[int], sigmas: list[float]) -> FlowBatch:
    """All images in one row, with two tokens of padding and room for one image more."""
    parts: list[dict[str, Tensor]] = []
    for image in range(len(z)):
        scale = scales[image]
        patches, targets = (patchify(t[image : image + 1], 2 * scale)[0] for t in (z, v))
        num = len(patches)
        pad = CONFIG.patch_values[-1] - patches.shape[1]
        parts.append(
            {
                "patches": torch.nn.functional.pad(patches, (0, pad)),
                "targets": torch.nn.functional.pad(targets, (0, pad)),
                "share": torch.full((num,), 1.0 / z[0].numel(), dtype=torch.float64),
                "scale": torch.full((num,), CONFIG.patch_scales.index(scale)),
                "at": patch_centres(
                    (z.shape[-2] // (2 * scale), z.shape[-1] // (2 * scale)), scale
                ),
                "id": torch.full((num,), image, dtype=torch.int32),
            }
        )
    num_images = len(z) + 1

    def row(key: str, fill: float) -> Tensor:
        cat = torch.cat([part[key] for part in parts])
        return torch.cat((cat, torch.full_like(cat[:2], fill))).unsqueeze(0)

    weight = row("share", 0)
    sigma_BN = torch.tensor([[*sigmas, 1.0]], dtype=torch.float32)
    return FlowBatch(
        patches_BSP=row("patches", 9.0),
        targets_BSP=row("targets", 9.0),
        share_BS=row("share", 0),
        weight_BS=weight * 2,
        scale_BS=row("scale", 0),
        coordinates_BSA=row("at", 0),
        document_ids_BS=row("id", num_images),
        sigma_BN=sigma_BN,
        condition=torch.tensor([[*(i % 3 for i in range(len(z))), 3]]),
        counts_BN=torch.tensor([[1] * len(z) + [0]]),
    )


def _objective(model: DiffusionTransformer, batch: FlowBatch):
    given = dict(zip(batch._fields[1:], batch[1:], strict=True))
    out = model.run_blocks(model.enter(batch[0], given), given)
    return model.objective(out, given, None), out


def test_a_block_loads_the_weights_of_the_language_models() -> None:
    """Without renaming: all that is missing is what starts at zero."""
    lm = LanguageModel.initialized(
        ModelConfig(layer_pattern=PATTERN, vocab_size=50, **SHAPE),  # type: ignore[arg-type]
        seed=1,
    )
    dit = DiffusionTransformer.initialized(CONFIG, seed=2)
    for name, block in lm.backbone.layers.items():
        missing, unexpected = dit.backbone.layers[name].load_state_dict(
            block.state_dict(), strict=False
        )
        assert unexpected == []
        for key in missing:
            assert key.startswith(("adaln.", "mixer.reverse.")) or key.endswith(".time_weight"), key
    assert sum(len(block.state_dict()) for block in lm.backbone.layers.values()) > 80


@pytest.mark.parametrize("layer_type", ["M", "S", "2", "X", "*", "W"])
def test_a_loaded_block_computes_what_the_language_models_does(layer_type: str) -> None:
    """With gates of one and nothing else; attention differs by what comes after, so it is shown
    one token only."""
    pattern = f"{layer_type}E"
    lm_config = ModelConfig(layer_pattern=pattern, vocab_size=50, **SHAPE)  # type: ignore[arg-type]
    config = DiTConfig(layer_pattern=pattern, **SHAPE, **IMAGE)  # type: ignore[arg-type]
    lm = LanguageModel.initialized(lm_config, seed=1).double()
    lm_block: Block = lm.backbone.layers["0"]  # type: ignore[assignment]
    block: Block = DiffusionTransformer.initialized(config, seed=2).double().backbone.layers["0"]  # type: ignore[assignment]
    block.load_state_dict(lm_block.state_dict(), strict=False)
    num = 1 if layer_type in "*W" else 21
    x_BSD = torch.randn(2, num, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at_BSA = torch.stack((torch.zeros(num), torch.arange(num).float()), -1).unsqueeze(0)
    shared = torch.zeros(2, 1, NUM_MODULATIONS, 24, dtype=torch.float64)
    shared[:, :, [2, 5]] = 1  # gates
    conditioning = Conditioning(
        shared, torch.randn(2, 1, 24).double(), torch.zeros(2, 1, dtype=torch.int64), Sight(at_BSA)
    )
    theirs, load_E, balance = lm_block(x_BSD, rope_tables(num, 8, 1e4, "cpu"))
    ours, load_UE, own_balance = block(
        x_BSD, image_rope_tables(at_BSA, 8, 1e4), conditioning=conditioning
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(load_UE.sum(0), load_E)
    torch.testing.assert_close(own_balance, balance)


def test_it_begins_as_the_identity_that_predicts_zero() -> None:
    model = fp64_model(stirred=False)
    z = _images(2)
    assert model(z, 0.4, torch.tensor([0, 2])).abs().max() == 0
    given = {"scale_BS": torch.zeros(2, 24, dtype=torch.int64), "sigma_BN": torch.full((2, 1), 0.4)}
    given |= {"condition": torch.zeros(2, 1, dtype=torch.int64)}
    x_BSD = model.enter(patchify(z, 2), given)
    full = {
        **given,
        "coordinates_BSA": patch_centres((4, 6), 1).unsqueeze(0),
        "document_ids_BS": torch.zeros(2, 24, dtype=torch.int32),
    }
    model.backbone.norm = None
    assert torch.equal(model.run_blocks(x_BSD, full).hidden_BSD, x_BSD)


def test_packed_images_of_mixed_sizes_are_the_images_one_by_one() -> None:
    """Loss, loads and every gradient; padding takes no part, whatever stands there."""
    model, z, v = fp64_model(), _images(4), _images(4).flip(0)
    scales, sigmas = [1, 2, 2, 1], [0.9, 0.3, 0.05, 0.6]
    sums, out = _objective(model, _packed(z, v, scales, sigmas))
    sums.total.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(packed) == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    total, load = torch.zeros(()), torch.zeros_like(out.load_LE)
    for image, (scale, sigma) in enumerate(zip(scales, sigmas, strict=True)):
        batch = _packed(z[image : image + 1], v[image : image + 1], [scale], [sigma])
        batch = batch._replace(condition=torch.tensor([[image % 3, 3]]))
        # One image to the row, without padding: nothing to tell apart.
        cut = [x[:, :-2] if i < 7 else x[:, :1] for i, x in enumerate(batch)]
        part, out = _objective(model, FlowBatch(*cut))
        part.total.backward()
        total, load = total + part.total.detach(), load + out.load_LE
        predicted = model(z[image : image + 1], sigma, torch.tensor([image % 3]), scale=scale)
        error = (predicted - v[image : image + 1]).square().mean()
        torch.testing.assert_close(part.error, error.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(part.total, 2 * error, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.total.detach(), total, rtol=1e-11, atol=0)
    assert torch.equal(sums.load_LE, load)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            packed[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_are_those_of_finite_differences() -> None:
    small = DiTConfig(layer_pattern="WEM-", **SHAPE, **IMAGE)  # type: ignore[arg-type]
    model, z, v = fp64_model(small), _images(2), _images(2).flip(0)
    batch = _packed(z, v, [2, 1], [0.7, 0.2])
    _objective(model, batch)[0].total.backward()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            parameter.data.add_(direction, alpha=step)
            values.append(float(_objective(model, batch)[0].total.detach()))
            parameter.data.add_(direction, alpha=-step)
        wanted = (values[0] - values[1]) / 2e-6
        got = float((parameter.grad * direction).sum())
        assert got == pytest.approx(wanted, rel=2e-5, abs=1e-7), name


def test_experts_are_counted_by_range_of_sigma() -> None:
    model, z = fp64_model(), _images(4)
    batch = _packed(z, z, [1, 1, 2, 2], [0.0, 0.26, 0.74, 1.0])
    load_LUE = _objective(model, batch)[0].load_LE
    assert load_LUE.shape == (5, CONFIG.load_buckets, 6)
    # 24 tokens at scale 1 and 6 at scale 2, two experts each; padding is not counted.
    assert load_LUE.sum(-1).tolist() == [[48, 48, 12, 12]] * 5


def test_the_router_sees_the_noise_level_but_not_the_modulation() -> None:
    model = fp64_model(stirred=False)
    block: Block = model.backbone.layers["1"]  # type: ignore[assignment]
    x_BSD = torch.randn(1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at_BSA = patch_centres((4, 6), 1).unsqueeze(0)

    def load(shift: float, time: float) -> Tensor:
        modulation = torch.zeros(1, 1, NUM_MODULATIONS, 24, dtype=torch.float64)
        modulation[:, :, 3:5] = shift
        conditioning = Conditioning(
            modulation,
            torch.full((1, 1, 24), time, dtype=torch.float64),
            torch.zeros(1, 1, dtype=torch.int64),
            Sight(at_BSA),
        )
        rope = image_rope_tables(at_BSA, 8, 1e4)
        return block(x_BSD, rope, None, None, conditioning)[1]

    assert torch.equal(load(0.0, 0.0), load(3.0, 0.0))
    assert torch.equal(load(0.0, 0.0), load(0.0, 1.0))  # its matrix starts at zero
    assert block.ffn is not None
    torch.nn.init.normal_(block.ffn.router.time_weight)  # type: ignore[union-attr]
    assert not torch.equal(load(0.0, 0.0), load(0.0, 1.0))


def test_late_patches_reach_early_ones() -> None:
    """In layers of every kind: none is causal."""
    for letter in "W*MS2X":
        window = {"sliding_window": 25}
        config = DiTConfig(layer_pattern=f"{letter}-", **(SHAPE | window), **IMAGE)  # type: ignore[arg-type]
        model, z = fp64_model(config), _images(1)
        changed = z.clone()
        changed[..., -2:, -2:] += 1
        classes = torch.tensor([1])
        moved = (model(z, 0.5, classes) - model(changed, 0.5, classes))[..., :2, :2]
        assert moved.abs().max() > 1e-9, letter


def test_conditions_by_embedding_and_none() -> None:
    z = _images(2)
    by_embedding = IMAGE | {"condition": "embedding", "num_classes": 0, "embedding_width": 5}
    model = fp64_model(DiTConfig(layer_pattern="W-", **SHAPE, **by_embedding))  # type: ignore[arg-type]
    vectors = torch.randn(2, 5).double()
    with_text = model(z, 0.5, vectors)
    assert not torch.equal(with_text, model(z, 0.5, vectors.flip(0)))
    none = model(z, 0.5, torch.zeros_like(vectors))
    model.condition.no_embedding.data.add_(1)  # type: ignore[union-attr]
    assert torch.equal(model(z, 0.5, vectors), with_text)
    assert not torch.equal(model(z, 0.5, torch.zeros_like(vectors)), none)
    plain = IMAGE | {"condition": "none", "num_classes": 0}
    model = fp64_model(DiTConfig(layer_pattern="W-", **SHAPE, **plain))  # type: ignore[arg-type]
    assert model(z, 0.5, torch.zeros(2, dtype=torch.int64)).shape == z.shape


def test_videos() -> None:
    """Three axes; local layers look inside a frame, global ones across."""
    video = IMAGE | {"num_axes": 3, "patch_frames": 2}
    z = _images(2, size=(4, 8, 8))
    for letter, crosses in (("W", False), ("*", True)):
        config = DiTConfig(layer_pattern=f"{letter}-", **SHAPE, **video)  # type: ignore[arg-type]
        model, classes = fp64_model(config), torch.tensor([0, 1])
        v = model(z, 0.5, classes)
        assert v.shape == z.shape
        assert model(z, 0.5, classes, scale=2).shape == z.shape
        changed = z.clone()
        changed[:, :, 2:] += 1
        moved = (model(changed, 0.5, classes) - v)[:, :, :2].abs().max()
        assert bool(moved > 1e-9) is crosses


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a whole number of"):
        fp64_model()(_images(1, size=(6, 8)), 0.5, torch.tensor([0]), scale=2)
    for key, value, match in (
        ("images.height=14", "", "scale 2"),
        ("model.patch_scales=[2,4]", "", "begin with 1"),
        ("model.num_classes=0", "", "num_classes=0"),
        ("model.condition=embedding", "", "num_classes=10"),
        ("batch.sequence_length=32", "", "less than the 64 tokens"),
    ):
        del value
        with pytest.raises(ConfigError, match=match):
            load_image_config(ROOT / "configs/dit_tiny.toml", [key])
