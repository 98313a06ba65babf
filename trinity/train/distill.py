"""Trains a patch adapter: at every noise level the coarse velocity should be the model's own.

Teacher and student are one model: itself at scale 1, and through the adapter at a coarse scale.
Needs clean latents and what they are conditioned on, and nothing else; the loss is the mean square
of the difference of the velocities ("DDiT", 2026). A run is a function of its configuration: one
that was broken off and went on ends as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from trinity.core.draws import Stream, generator_for, normal_by_row
from trinity.core.errors import CheckpointError, ConfigError, TrainingError
from trinity.models.flow import SigmaDensity, interpolate, training_sigmas
from trinity.models.patch_adapter import PatchAdapter, read_adapter_file
from trinity.optim.schedule import lr_factor
from trinity.train.metrics import MetricsWriter

STATE_FILE = "state.safetensors"
"""Adapter and optimizer, to go on from."""
ADAPTER_FILE = "adapter.safetensors"
"""The adapter alone, for use."""
_HELD_OUT_SEED = 1 << 32
"""Added to the seed for what errors are measured on."""


@dataclass(frozen=True)
class DistillConfig:
    """How an adapter is trained. Raises ConfigError for values that cannot work."""

    num_steps: int = 1000
    batch_rows: int = 16
    """Rows of a step; all at one scale, scales by turns."""
    learning_rate: float = 1e-3
    """Of projections, residual path and size vectors."""
    lora_learning_rate: float = 1e-4
    warmup_steps: int = 20
    final_fraction: float = 0.1
    """Of the learning rates, at the end of a cosine."""
    max_grad_norm: float = 1.0
    sigma_mean: float = 0.5
    """Mean of the logit of sigma, per doubling of the patch: coarse sizes serve high noise."""
    sigma_std: float = 1.0
    seed: int = 0
    held_out_rows: int = 32
    """Rows at the end of the latents that errors are measured on and training never sees."""
    report_sigmas: tuple[float, ...] = (0.95, 0.8, 0.6, 0.4, 0.2)
    log_every_steps: int = 10
    save_every_steps: int = 500
    """A multiple of ``log_every_steps``: what is saved has been looked at, and is recorded."""

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("num_steps", "batch_rows", "log_every_steps", "save_every_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"distillation: {key} = {getattr(self, key)}: use 1 or more")
        for key in ("learning_rate", "lora_learning_rate", "max_grad_norm", "sigma_std"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ConfigError(f"distillation: {key} = {getattr(self, key)}: use more than 0")
        if self.save_every_steps % self.log_every_steps:
            raise ConfigError(
                f"distillation: save_every_steps = {self.save_every_steps}: use a multiple of "
                f"log_every_steps = {self.log_every_steps}"
            )
        if self.held_out_rows < 1 or not all(0 < sigma <= 1 for sigma in self.report_sigmas):
            raise ConfigError(
                f"distillation: held_out_rows = {self.held_out_rows}, report_sigmas = "
                f"{self.report_sigmas}: use 1 row or more, and sigmas above 0, up to 1"
            )

    def density(self, scale: int) -> SigmaDensity:
        """Where on the path a scale is trained."""
        return SigmaDensity(mean=self.sigma_mean * math.log2(scale), std=self.sigma_std)


class DistillReport(NamedTuple):
    """What came of a run."""

    before: dict[int, dict[float, float]]
    """Relative errors by scale and sigma when this call began; see ``relative_errors``."""
    after: dict[int, dict[float, float]]
    first_step: int
    """Where this call began: above 0 when it went on with a run."""


class _Noisy(NamedTuple):
    """Latents on their way, and what the model is told of them."""

    z: Tensor
    sigma_B: Tensor
    condition: Any


def distill(
    adapter: PatchAdapter,
    latents: Tensor,
    condition: Any,
    config: DistillConfig,
    *,
    folder: str | Path | None = None,
) -> DistillReport:
    """Train ``adapter`` in place on clean latents (N, C, ...) and a condition of N rows.

    The model is frozen meanwhile and then as it was. With a ``folder`` it writes metrics.jsonl,
    saves state every ``save_every_steps``, the finished adapter too, and goes on from the state it
    finds there. Latents may stay on the CPU; each batch goes to the adapter's device.

    Raises ConfigError when there are not enough latents, CheckpointError when the folder holds
    another run, TrainingError when the loss is not finite.
    """
    num_train = len(latents) - config.held_out_rows
    if num_train < 1:
        raise ConfigError(
            f"distillation: {len(latents)} latents with held_out_rows = {config.held_out_rows}: "
            "pass more latents"
        )
    optimizer = _optimizer(adapter, config)
    run_dir = None if folder is None else Path(folder)
    first_step = 0
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        first_step = _resume(adapter, optimizer, config, run_dir)
    with _frozen(adapter), contextlib.ExitStack() as stack:
        writer = None
        if run_dir is not None:
            writer = MetricsWriter(run_dir, start_step=first_step, tensorboard=False)
            stack.enter_context(writer)
        before = _all_errors(adapter, latents, condition, config)
        losses: list[Tensor] = []
        for step in range(first_step, config.num_steps):
            rows_B = _rows_of_step(step, num_train, config)
            batch = _noisy(adapter, latents, condition, rows_B, step, config)
            losses.append(_train_step(adapter, optimizer, batch, step, config))
            is_last = step + 1 == config.num_steps
            if is_last or (step + 1) % config.log_every_steps == 0:
                loss = _finite_mean(losses, step + 1)
                losses = []
                if writer is not None:
                    writer.write("train", step + 1, {"loss": loss})
            if run_dir is not None and (is_last or (step + 1) % config.save_every_steps == 0):
                _save(adapter, optimizer, config, step + 1, run_dir)
        after = _all_errors(adapter, latents, condition, config)
        if writer is not None and first_step < config.num_steps:
            for scale, errors in after.items():
                named = {f"error_{sigma:g}": error for sigma, error in errors.items()}
                writer.write("validation", config.num_steps, {"scale": scale, **named})
    if run_dir is not None:
        adapter.save(run_dir / ADAPTER_FILE)
    return DistillReport(before, after, first_step)


@torch.no_grad()
def relative_errors(
    adapter: PatchAdapter,
    latents: Tensor,
    condition: Any,
    scale: int,
    *,
    sigmas: tuple[float, ...] = (0.95, 0.8, 0.6, 0.4, 0.2),
    seed: int = 0,
    batch_rows: int = 32,
) -> dict[float, float]:
    """``|v_coarse - v_fine|^2 / |v_fine|^2`` by noise level, summed over all latents (N, C, ...).

    1 is as bad as no velocity at all; noise is the same for every scale, adapter and sigma.
    """
    errors = {}
    for sigma in sigmas:
        wrong = whole = 0.0
        for first in range(0, len(latents), batch_rows):
            rows_B = torch.arange(first, min(first + batch_rows, len(latents)))
            sigma_B = torch.full((len(rows_B),), sigma)
            numbers = rows_B.tolist()
            batch = _at_sigma(adapter, latents, condition, rows_B, sigma_B, seed, 0, numbers)
            fine = adapter(*batch, scale=1).double()
            wrong += float((adapter(*batch, scale=scale).double() - fine).square().sum())
            whole += float(fine.square().sum())
        errors[sigma] = wrong / whole
    return errors


def _all_errors(
    adapter: PatchAdapter, latents: Tensor, condition: Any, config: DistillConfig
) -> dict[int, dict[float, float]]:
    held_out = torch.arange(len(latents) - config.held_out_rows, len(latents))
    return {
        scale: relative_errors(
            adapter,
            latents[held_out],
            adapter.host.take(condition, held_out),
            scale,
            sigmas=config.report_sigmas,
            seed=config.seed + _HELD_OUT_SEED,
            batch_rows=config.batch_rows,
        )
        for scale in adapter.scales[1:]
    }


def _rows_of_step(step: int, num_rows: int, config: DistillConfig) -> Tensor:
    """Rows of a step: every epoch takes each row once, in an order of its own."""
    places = range(step * config.batch_rows, (step + 1) * config.batch_rows)
    epochs = sorted({place // num_rows for place in places})
    # Nothing else is drawn from this stream here: no condition is ever left out.
    orders = {
        epoch: generator_for(config.seed, epoch, 0, Stream.CONDITION).permutation(num_rows)
        for epoch in epochs
    }
    return torch.tensor([int(orders[place // num_rows][place % num_rows]) for place in places])


def _noisy(
    adapter: PatchAdapter,
    latents: Tensor,
    condition: Any,
    rows_B: Tensor,
    step: int,
    config: DistillConfig,
) -> _Noisy:
    density = config.density(_scale_of(adapter, step))
    sigma_B = training_sigmas(config.seed, step, range(len(rows_B)), density)
    numbers = list(range(len(rows_B)))
    return _at_sigma(adapter, latents, condition, rows_B, sigma_B, config.seed, step, numbers)


def _at_sigma(
    adapter: PatchAdapter,
    latents: Tensor,
    condition: Any,
    rows_B: Tensor,
    sigma_B: Tensor,
    seed: int,
    step: int,
    numbers: list[int],
) -> _Noisy:
    """Rows of the latents, with the noise of ``numbers`` in ``step``.

    Channels beyond the velocity's are given to the model clean.
    """
    device = next(adapter.parameters()).device
    x = latents[rows_B.to(latents.device)].to(device, torch.float32)
    channels = adapter.host.geometry.out_channels
    shape = (channels, *x.shape[2:])
    eps = normal_by_row(seed, step, numbers, shape, Stream.NOISE).to(x)
    sigma_B = sigma_B.to(x)
    z = torch.cat([interpolate(x[:, :channels], eps, sigma_B), x[:, channels:]], dim=1)
    return _Noisy(z, sigma_B, adapter.host.take(condition, rows_B))


def _scale_of(adapter: PatchAdapter, step: int) -> int:
    coarse = adapter.scales[1:]
    return coarse[step % len(coarse)]


def _train_step(
    adapter: PatchAdapter,
    optimizer: torch.optim.Optimizer,
    batch: _Noisy,
    step: int,
    config: DistillConfig,
) -> Tensor:
    """One step on one scale; parameters of the others have no gradient and do not move."""
    scale = _scale_of(adapter, step)
    factor = lr_factor(
        step,
        shape="cosine",
        warmup_steps=config.warmup_steps,
        num_steps=config.num_steps,
        decay_steps=0,
        final_fraction=config.final_fraction,
        decay_shape="cosine",
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    with torch.no_grad():
        target = adapter(*batch, scale=1).float()
    optimizer.zero_grad(set_to_none=True)
    with adapter.attached(scale):
        loss = (adapter(*batch, scale=scale).float() - target).square().mean()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(adapter.part(scale).parameters(), config.max_grad_norm)
    optimizer.step()
    return loss.detach()


def _optimizer(adapter: PatchAdapter, config: DistillConfig) -> torch.optim.AdamW:
    lora = [p for name, p in adapter.named_parameters() if ".lora." in name]
    rest = [p for name, p in adapter.named_parameters() if ".lora." not in name]
    groups = [
        {"params": rest, "peak_lr": config.learning_rate},
        {"params": lora, "peak_lr": config.lora_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _finite_mean(losses: list[Tensor], step: int) -> float:
    """Mean loss of some steps, the last of them ``step``. TrainingError when one is not finite."""
    values = [float(loss) for loss in losses]
    if not all(math.isfinite(value) for value in values):
        raise TrainingError(
            f"distillation: the loss is not finite at step {step}: lower learning_rate, or look "
            "for latents or conditions that are not finite"
        )
    return sum(values) / len(values)


@contextlib.contextmanager
def _frozen(adapter: PatchAdapter) -> Iterator[None]:
    """While entered, the model's parameters collect no gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in adapter.host.base.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _config_text(config: DistillConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _save(
    adapter: PatchAdapter,
    optimizer: torch.optim.Optimizer,
    config: DistillConfig,
    step: int,
    run_dir: Path,
) -> None:
    """Write the state in one file, so that weights and moments are always of one step."""
    tensors = {f"adapter:{name}": t.contiguous() for name, t in adapter.state_dict().items()}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.contiguous()
    metadata = {**adapter.metadata(), "step": str(step), "config": _config_text(config)}
    temporary = run_dir / f"{STATE_FILE}.tmp"
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, run_dir / STATE_FILE)


def _resume(
    adapter: PatchAdapter, optimizer: torch.optim.Optimizer, config: DistillConfig, run_dir: Path
) -> int:
    """Take over the state in ``run_dir``, if there is one; the number of steps done."""
    path = run_dir / STATE_FILE
    if not path.is_file():
        return 0
    metadata, tensors = read_adapter_file(path)
    expected = {**adapter.metadata(), "config": _config_text(config)}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise CheckpointError(
                f"distillation: {path} is of another run: its {key} is {metadata.get(key)}, here "
                f"it is {value}: use another folder, or the same configuration"
            )
    by_kind: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, name = full_name.partition(":")
        by_kind.setdefault(kind, {})[name] = tensor
    adapter.load_weights(by_kind.pop("adapter", {}), source=str(path))
    for name, parameter in adapter.named_parameters():
        state = {kind: values[name] for kind, values in by_kind.items() if name in values}
        if state:
            # The step counter stays on the CPU, as the optimizer keeps it.
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter)
                for kind, value in state.items()
            }
    return int(metadata["step"])
