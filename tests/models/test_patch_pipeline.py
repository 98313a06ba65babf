"""Dynamic patches inside the pipelines of diffusers, built from tiny random parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.patch_cases import (
    stirred,
    tiny_flux,
    tiny_wan,
    videos,
    wan_adapter,
    wan_condition,
)
from tests.models.pipeline_cases import HALVES, HALVES_SIZES, NUM_STEPS, flux_pipe, wan_pipe
from trinity.core.errors import ConfigError
from trinity.models.host_flux import FluxHost
from trinity.models.host_wan import WanHost
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_pipeline import DynamicTransformer, dynamic_patches
from trinity.models.patch_scheduler import PatchScheduler


def _run(pipe: Any, **more: Any) -> Any:
    """Pixels (or latents) of two prompts, always from the same noise."""
    size = {"height": 16, "width": 24}
    if "Wan" in type(pipe).__name__:
        size = {"height": 32, "width": 48, "num_frames": 3}
    arguments = {
        "prompt": ["a red cat", "a dog"],
        "num_inference_steps": NUM_STEPS,
        "output_type": "pt",
        "max_sequence_length": 8,
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(**{**arguments, **size, **more}, return_dict=False)[0]


@pytest.fixture(scope="module")
def flux() -> tuple[Any, PatchAdapter]:
    base = tiny_flux(guidance_embeds=True)
    return flux_pipe(base), stirred(PatchAdapter(FluxHost(base), lora_rank=3), amount=0.05)


@pytest.fixture(scope="module")
def wan() -> tuple[Any, PatchAdapter]:
    base = tiny_wan()
    return wan_pipe(base), stirred(PatchAdapter(WanHost(base), lora_rank=3), amount=0.05)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_pipeline_at_the_base_patch_is_itself_to_the_bit(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipe, adapter = request.getfixturevalue(name)
    transformer, config = pipe.transformer, pipe.config["transformer"]
    expected = _run(pipe)
    with dynamic_patches(pipe, adapter, PatchScheduler(0.0)) as dynamic:
        assert pipe.transformer is dynamic
        assert torch.equal(_run(pipe), expected)
        assert torch.equal(_run(pipe), expected)  # a second run begins anew
        assert dynamic.record().scale_KB.shape == (NUM_STEPS, 2)
    assert pipe.transformer is transformer
    assert pipe.config["transformer"] == config
    assert torch.equal(_run(pipe), expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_pipeline_samples_on_dynamic_patches(name: str, request: Any) -> None:
    """Sizes as the rule has it, tokens as recorded, the picture another one."""
    pipe, adapter = request.getfixturevalue(name)
    expected = _run(pipe)
    with dynamic_patches(pipe, adapter, PatchScheduler(1e3, min_fine_last=2)) as dynamic:
        got = _run(pipe)
        record = dynamic.record()
    assert record.scale_KB.tolist() == [[1, 1]] * 3 + [[4, 4]] * 7 + [[1, 1]] * 2
    tokens = 96 * 4 if name == "wan" else 96
    assert record.tokens_KB[:, 0].tolist() == [tokens] * 3 + [tokens // 16] * 7 + [tokens] * 2
    assert got.shape == expected.shape
    assert got.isfinite().all()
    assert not torch.allclose(got, expected, atol=1e-3)


def test_the_pair_of_a_guided_step_shares_one_decision(wan: Any, flux: Any) -> None:
    for pipe, adapter in (wan, flux):
        more: dict[str, Any] = {"negative_prompt": ["dog", "dog"]}
        more |= {"guidance_scale": 3.0} if pipe is wan[0] else {"true_cfg_scale": 3.0}
        sizes: list[int] = []
        original = adapter.forward

        def spied(*args: Any, original: Any = original, sizes: Any = sizes, **kwargs: Any) -> Any:
            sizes.append(args[3])
            return original(*args, **kwargs)

        adapter.forward = spied
        try:
            with dynamic_patches(pipe, adapter, HALVES) as dynamic:
                _run(pipe, **more)
                assert dynamic.record().scale_KB[:, 0].tolist() == HALVES_SIZES
        finally:
            del adapter.forward
        assert sizes == [size for size in HALVES_SIZES for _ in range(2)]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_pipeline_in_half_precision_is_measured_in_full(name: str) -> None:
    """Latents stay exact from the first step on, and reach the decoder in its own precision."""
    base = tiny_flux() if name == "flux" else tiny_wan()
    pipe = (flux_pipe if name == "flux" else wan_pipe)(base).to(torch.bfloat16)
    adapter = PatchAdapter((FluxHost if name == "flux" else WanHost)(base), lora_rank=3)
    dtypes = []

    def watch(_pipe: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        dtypes.append(values["latents"].dtype)
        return {}

    with dynamic_patches(pipe, adapter, PatchScheduler(1e-2, hold=1)) as dynamic:
        pixels = _run(pipe, callback_on_step_end=watch)
        spreads = dynamic.record().statistic_KBS[3:]
    last = torch.bfloat16 if name == "flux" else torch.float32
    assert dtypes == [torch.float32] * (NUM_STEPS - 1) + [last]
    assert pixels.isfinite().all()
    pipe.to(torch.float32)  # the same weights, rounded
    with dynamic_patches(pipe, adapter, PatchScheduler(1e-2, hold=1)) as dynamic:
        _run(pipe)
        exact = dynamic.record().statistic_KBS[3:]
    torch.testing.assert_close(spreads, exact, rtol=0.3, atol=0)


def test_a_batch_with_mixed_sizes_is_answered_row_by_row() -> None:
    """Of a Wan model, beside extra channels that the rule must not look at."""
    base = tiny_wan(in_channels=5)
    adapter = stirred(PatchAdapter(WanHost(base), lora_rank=3), amount=0.05)
    z, condition = torch.cat([videos(2), videos(2)[:, :2]], dim=1), wan_condition(2)
    pace_B = torch.tensor([1e-4, 1.0]).view(2, 1, 1, 1, 1)  # one row stays almost where it is
    dynamic = DynamicTransformer(base, adapter, PatchScheduler(1e-4), num_steps=20)
    latents, sizes = z.clone(), []
    with torch.no_grad():
        for step in range(12):
            sigma = 1 - step / 20
            timestep = torch.full((2,), 1000 * sigma)
            got = dynamic(latents, timestep, condition.prompt_BSD, return_dict=False)[0]
            sizes = dynamic.record().scale_KB[-1].tolist()
            for row, size in enumerate(sizes):
                one = torch.tensor([row])
                taken = adapter.host.take(condition, one)
                alone = adapter(latents[one], torch.tensor([sigma]), taken, size)
                torch.testing.assert_close(got[one], alone, rtol=1e-4, atol=1e-5)
            latents[:, :3] -= pace_B * (0.05 + 0.02 * (step % 2)) * got  # in place, as loops may
            latents[:, 3:] = torch.randn_like(latents[:, 3:])
    assert sizes == [4, 1]


def test_it_looks_like_the_model_it_stands_for() -> None:
    adapter, base = wan_adapter()
    dynamic = DynamicTransformer(base, adapter, HALVES, num_steps=NUM_STEPS)
    model: Any = base
    assert dynamic.config is model.config
    assert dynamic.device == model.device
    assert dynamic.dtype == torch.float32
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = dynamic.no_such_thing
    answer = dynamic(videos(1), torch.tensor([900.0]), wan_condition(1).prompt_BSD)
    assert torch.equal(answer.sample, answer[0])
    assert {id(p) for p in dynamic.parameters()} == {
        id(p) for p in (*base.parameters(), *adapter.parameters())
    }


def test_runs_begin_where_sigma_rises_or_shapes_change() -> None:
    adapter, base = wan_adapter()
    dynamic = DynamicTransformer(base, adapter, HALVES, num_steps=4)

    def call(z: Tensor, timestep: float) -> list[int]:
        with torch.no_grad():
            dynamic(z, torch.full((len(z),), timestep), wan_condition(len(z)).prompt_BSD)
        return dynamic.record().scale_KB[:, 0].tolist()

    assert [call(videos(1), t) for t in (1000, 750, 750)][-1] == [4, 2]
    assert call(videos(1), 800) == [4]
    assert call(videos(2), 700) == [4]
    assert call(videos(2), 600) == [4, 2]
    dynamic.reset()
    assert call(videos(2), 500) == [4]


class _OnlyPatches(WanHost):
    """A host that knows no pipelines."""

    read_call = None


def test_mistakes_are_told() -> None:
    adapter, base = wan_adapter(scales=(1, 2))
    rule = PatchScheduler(0.1, sizes=(1, 2))
    with pytest.raises(ConfigError, match="holds another model"):
        DynamicTransformer(tiny_wan(), adapter, rule)
    with pytest.raises(ConfigError, match="sizes"):
        DynamicTransformer(base, adapter, PatchScheduler(0.1))
    host, adapter.host = adapter.host, _OnlyPatches(base)
    with pytest.raises(ConfigError, match="_OnlyPatches cannot read the calls"):
        DynamicTransformer(base, adapter, rule)
    adapter.host = host
    dynamic = DynamicTransformer(base, adapter, rule)
    with pytest.raises(ConfigError, match="no run to report"):
        dynamic.record()
    prompt_BSD = wan_condition(2).prompt_BSD
    with pytest.raises(ConfigError, match="noise_schedule"):
        dynamic(videos(2), torch.tensor([900.0, 900.0]), prompt_BSD)
    with pytest.raises(ConfigError, match=r"rows at noise levels \[0.8, 0.9\]"):
        dynamic(videos(2), torch.tensor([900.0, 800.0]), prompt_BSD)
    half = DynamicTransformer(base, adapter, rule, num_steps=8)
    for timestep in (1000.0, 900.0, 800.0, 700.0):
        half(videos(2).bfloat16(), torch.full((2,), timestep), prompt_BSD)
    with pytest.raises(ConfigError, match="float32"):
        half(videos(2).bfloat16(), torch.full((2,), 600.0), prompt_BSD)
