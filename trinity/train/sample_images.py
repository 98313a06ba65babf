"""Pictures out of a model: the grid at the end of a run, and ``trinity sample-images``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.ckpt.load import load_run_dit
from trinity.core.draws import Stream, normal_by_row
from trinity.core.errors import ConfigError, DataError
from trinity.core.image_run_config import ImageRunConfig, SamplesConfig
from trinity.core.load_config import load_image_config
from trinity.core.run_files import CONFIG_FILE
from trinity.core.runtime import autocast, choose_device
from trinity.models.dit import DiffusionTransformer
from trinity.models.first_block_cache import FirstBlockCache
from trinity.models.flow import ancestral, euler, guided, heun, sampling_sigmas
from trinity.models.patch_sampler import FixedSplit, PatchedVelocity, PatchPolicy, PatchRecord
from trinity.models.patch_scheduler import PatchScheduler, calibrate_tau
from trinity.train.picture import save_grid
from trinity.train.run import Run
from trinity.train.sample_conditions import grid_condition, no_condition, parse_classes

SAMPLES_FILE = "samples.png"
SAMPLING = 2
"""What random numbers are drawn for; see :mod:`trinity.train.flow_batches`."""


@torch.inference_mode()
def sample(
    model: DiffusionTransformer,
    config: ImageRunConfig,
    condition: Tensor,
    *,
    settings: SamplesConfig,
    seed: int,
    scale: int = 1,
    policy: PatchPolicy | None = None,
) -> Drawn:
    """One image or latent for each condition.

    Image i is a function of the weights, ``seed``, i and its condition alone.

    Args:
        model: on any device, in evaluation mode.
        config: of the run it comes from.
        condition: classes (B,), or embeddings (B, W).
        settings: steps, solver, guidance, cache.
        seed: of the noise.
        scale: patches of so many base patches a side, in all steps.
        policy: chooses patch sizes instead, for every image and step; by default ``settings.tau``
            does where it is not 0.
    """
    device = next(model.parameters()).device
    condition = condition.to(device)
    rows = range(len(condition))
    shape = (config.model.channels, *config.images.extent())
    noise = normal_by_row(seed, SAMPLING, rows, shape, Stream.NOISE).to(device)
    sigmas = sampling_sigmas(settings.num_steps, config.flow.shift)
    cache = FirstBlockCache(settings.cache) if settings.cache else None

    def of_group(z: Tensor, sigma: float, scale: int, rows_N: Tensor) -> Tensor:
        def conditional(z: Tensor, sigma: float, condition: Tensor) -> Tensor:
            reuse = None
            if cache is not None:
                # The second half of a guided batch are rows of their own.
                halves = [rows_N + half * len(noise) for half in range(len(z) // len(rows_N))]
                reuse = cache.at(scale, torch.cat(halves).tolist())
            with autocast(device, config.train.precision):
                return model(z, sigma, condition, scale=scale, reuse=reuse).float()

        own = condition[rows_N.to(device)]
        none = no_condition(config, own)
        return guided(conditional, own, none, scale=settings.guidance)(z, sigma)

    if policy is None:
        policy = scheduler(config, settings) if settings.tau else FixedSplit(((scale, 1.0),))
    velocity = PatchedVelocity(of_group, policy, settings.num_steps)
    path: Iterator[Tensor]
    if settings.solver == "ancestral":
        path = ancestral(velocity, noise, sigmas, seed=seed)
    else:
        path = {"euler": euler, "heun": heun}[settings.solver](velocity, noise, sigmas)
    z = noise
    for latents in path:
        z = latents
    computed = 1.0 if cache is None else cache.num_computed / cache.num_calls
    return Drawn(z.cpu(), velocity.path.record(config.tokens_of_image), computed)


class Drawn(NamedTuple):
    """Samples, and what they took."""

    images: Tensor
    """(B, C, H, W) or (B, C, T, H, W), fp32."""
    record: PatchRecord
    computed: float = 1.0
    """Share of the calls, row by row, that went through all blocks, not through the first alone."""


def scheduler(config: ImageRunConfig, settings: SamplesConfig) -> PatchScheduler:
    """The rule that chooses among the patch sizes the model was trained with."""
    return PatchScheduler(
        tau=settings.tau,
        rho=settings.rho,
        hold=settings.hold_steps,
        min_fine_last=settings.fine_last_steps,
        sizes=config.model.patch_scales,
        base_patch=config.model.patch_size,
    )


def calibrated_tau(
    model: DiffusionTransformer,
    config: ImageRunConfig,
    condition: Tensor,
    *,
    settings: SamplesConfig,
    seed: int,
    coarse_share: float,
) -> float:
    """The threshold at which large patches are given up after ``coarse_share`` of the steps.

    Found from samples drawn at the base patch, with the cache of ``settings``, whose skipped calls
    bend the path too. Raises ConfigError for a share that leaves the rule
    nothing to read.
    """
    never = scheduler(config, settings.model_copy(update={"tau": 0.0}))
    stop_step = round(coarse_share * settings.num_steps)
    if len(never.sizes) == 1:
        raise ConfigError("there is no tau to calibrate: model.patch_scales=[1] leaves no choice")
    if not never.order <= stop_step < settings.num_steps:
        raise ConfigError(
            f"--calibrate {coarse_share} of {settings.num_steps} steps is step {stop_step}; it "
            f"must be one from {never.order} to {settings.num_steps - 1}"
        )
    drawn = sample(model, config, condition, settings=settings, seed=seed, policy=never)
    return calibrate_tau(drawn.record.statistic_KBS[:, :, 0], stop_step)


def sample_grid(run: Run) -> Path:
    """Write the grid of a run that has ended, with the averaged weights where it keeps any.

    Of the last checkpoint: of many processes none has the whole model. Raises as
    :func:`sample_images_command`.
    """
    config = run.config
    assert isinstance(config, ImageRunConfig)
    path = run.directory / SAMPLES_FILE
    model = load_run_dit(run.directory, average=True, checkpoint=run.saved).to(run.device)
    condition = grid_condition(config, config.samples, config.samples.rows)
    _draw(model, config, config.samples, condition, path, seed=config.seed)
    return path


def _draw(
    model: DiffusionTransformer,
    config: ImageRunConfig,
    settings: SamplesConfig,
    condition: Tensor,
    path: Path,
    *,
    seed: int,
    scale: int = 1,
) -> Drawn:
    drawn = sample(model, config, condition, settings=settings, seed=seed, scale=scale)
    save_grid(path, drawn.images, columns=len(condition) // settings.rows)
    return drawn


def sample_images_command(
    run_dir: Path,
    output: Path,
    *,
    classes: str | None,
    embeddings: Path | None,
    overrides: Mapping[str, Any],
    scale: int | None,
    ema: bool,
    seed: int,
    save: Path | None,
    calibrate: float | None,
    device: str,
) -> None:
    """Run ``trinity sample-images``."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    config = load_image_config(run_dir / CONFIG_FILE)
    given = {key: value for key, value in overrides.items() if value is not None}
    settings = _settings(config, given, scale, calibrate)
    shown = {
        "classes": None if classes is None else parse_classes(classes),
        "embeddings": embeddings,
    }
    condition = grid_condition(config, settings, settings.rows, **shown)
    model = load_run_dit(run_dir, average=ema).to(choose_device(device))
    if calibrate is not None:
        tau = calibrated_tau(
            model,
            config,
            grid_condition(config, settings, 1, **shown),
            settings=settings,
            seed=seed,
            coarse_share=calibrate,
        )
        print(f"tau {tau:.3g}")
        settings = settings.model_copy(update={"tau": tau})
    drawn = _draw(model, config, settings, condition, output, seed=seed, scale=scale or 1)
    if save is not None:
        _save(save, drawn.images)
    fraction = drawn.record.tokens_KB.double().mean() / config.tokens_of_image
    skipped = f"; the cache skipped {1 - drawn.computed:.0%} of the calls" if settings.cache else ""
    print(f"wrote {output}; {float(fraction):.0%} of the tokens of the base patch{skipped}")


def _settings(
    config: ImageRunConfig, given: dict[str, Any], scale: int | None, calibrate: float | None
) -> SamplesConfig:
    """The run's settings with what was given in their place."""
    if given.get("solver") not in (None, "euler", "heun", "ancestral"):
        raise ConfigError(f"--solver {given['solver']} is none of euler, heun, ancestral")
    choices = {"--scale": scale, "--tau": given.get("tau"), "--calibrate": calibrate}
    chosen = [name for name, value in choices.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} each choose patch sizes; give one of them")
    if scale is not None:
        given = {**given, "tau": 0.0}
        if scale not in config.model.patch_scales:
            raise ConfigError(
                f"--scale {scale}: the model was trained with patch scales "
                f"{', '.join(str(s) for s in config.model.patch_scales)}"
            )
    return config.samples.model_copy(update=given)


def _save(path: Path, images: Tensor) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"samples": images.contiguous()}, str(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot write the samples: {error}; free space there") from None
