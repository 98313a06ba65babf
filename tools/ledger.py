"""The parity ledger: every parallel layout computes what one process computes.

Each layout trains a small mixture of experts on gloo ranks for two steps of Muon and AdamW, saves,
resumes in new processes, and trains two steps more. Compared with one process that was never
interrupted: losses, gradient norms, every parameter, the optimizer state and the balancing state
after two steps, and the losses after the resume. In fp64, so that what differs is an error.

    python -m tools.ledger --save                  # the table of the README
    python -m tools.ledger --only ep2 --dtype fp32
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from tools.ranks import on_ranks
from trinity.ckpt.store import load_tensors, stored_names
from trinity.core.config import RunConfig
from trinity.core.load_config import load_any_config
from trinity.core.sharding import local_tensor
from trinity.nn.init import fill_normal
from trinity.train.run import Run, create_run_directory, open_run
from trinity.train.step import train_step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools/bench/results/ledger.json"
TOLERANCE = {"fp64": 1e-10, "fp32": 5e-5}
"""Largest relative difference: fp64 leaves eleven digits; in fp32 a changed order of summation
grows through two optimizer steps, through routing decisions that are close, and through sums of
weights that 2Mamba divides by."""

LAYOUTS: dict[str, dict[str, object]] = {
    "fsdp2": {"dp_shard": 2},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2": {"tp": 2, "sequence_parallel": False},
    "tp2+sp": {"tp": 2},
    "ep2": {"dp_shard": 2, "ep": 2},
    "ep4": {"dp_shard": 4, "ep": 4},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "fsdp2 x ep2": {"dp_shard": 4, "ep": 2},
    "fsdp2 x tp2": {"dp_shard": 2, "tp": 2},
    "tp2 x ep2": {"tp": 2, "ep": 2},
    "ep2 x cp2": {"cp": 2, "dp_shard": 2, "ep": 2},
    "pp2 x fsdp2": {"pp": 2, "dp_shard": 2},
    "pp2 x ep2": {"pp": 2, "dp_shard": 2, "ep": 2},
    "tp2 x pp2 x fsdp2": {"pp": 2, "tp": 2, "dp_shard": 2},
}
ZERO_BUBBLE = {"pp_stages_per_rank": 2, "reshard_after_forward": False}
HYBRID = [
    "model.layer_pattern='M-SE2EXEWE*E'",
    "model.num_hidden_layers=6",
    "model.mamba2={head_dim=8, state_dim=8, num_groups=2, conv_width=3}",
    "model.linear={head_dim=8, norm_groups=2}",
]
"""A layer of every linear-time type, then both kinds of attention."""
VARIANTS: dict[str, tuple[dict[str, object], list[str]]] = {
    "pp2 interleaved": (
        {"pp": 2, "pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2},
        [],
    ),
    "pp2 zbv x fsdp2 x ep2": (
        {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "zbv", **ZERO_BUBBLE},
        [],
    ),
    "pp2 dualpipev": ({"pp": 2, "pp_schedule": "dualpipev", **ZERO_BUBBLE}, []),
    "pp2 zbv, selective recompute": (
        {"pp": 2, "pp_schedule": "zbv", **ZERO_BUBBLE},
        ["train.recompute=selective"],
    ),
    "ep2, full recompute": ({"dp_shard": 2, "ep": 2}, ["train.recompute=full"]),
    "ep2, selective recompute": ({"dp_shard": 2, "ep": 2}, ["train.recompute=selective"]),
    "tp2 x ep2, full recompute": ({"tp": 2, "ep": 2}, ["train.recompute=full"]),
    "ep2, gathered once": ({"dp_shard": 2, "ep": 2, "reshard_after_forward": False}, []),
    "hsdp2x2 x ep2": ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, []),
    "cp4": ({"cp": 4}, []),
    "cp2 x tp2 x ep4": ({"cp": 2, "tp": 2, "ep": 4}, []),
    "fsdp3, uneven shards": (
        {"dp_shard": 3},
        ["batch.rows_per_step=6", "model.num_experts=9", "model.moe_intermediate_size=20"],
    ),
    "fsdp8 x ep2, experts cut by width": (
        {"dp_shard": 8, "ep": 2},
        ["model.num_experts=4"],
    ),
    "hybrid, fsdp2 x ep2 x cp2": ({"dp_shard": 2, "cp": 2, "ep": 2}, HYBRID),
    "hybrid, cp4": ({"cp": 4}, HYBRID),
    "hybrid, tp2": ({"tp": 2, "sequence_parallel": False}, HYBRID),
    "hybrid, tp2 x cp2": ({"tp": 2, "cp": 2}, HYBRID),
    "hybrid, pp2 x ep2": ({"pp": 2, "dp_shard": 2, "ep": 2}, HYBRID),
    "hybrid, tp2 x ep2, full recompute": (
        {"tp": 2, "ep": 2},
        [*HYBRID, "train.recompute=full"],
    ),
    "hybrid, cp2 x ep2, selective recompute": (
        {"cp": 2, "ep": 2},
        [*HYBRID, "train.recompute=selective"],
    ),
}
"""Schedules, recompute modes and combinations beyond the table, with their overrides."""
DIT = {f"DiT, {name}": axes for name, axes in LAYOUTS.items()}
"""The same layouts, for a diffusion transformer with every kind of layer."""
COLUMNS = ("loss", "gradient norm", "parameters", "optimizer state", "SMEBU state", "resumed")


class Outcome(NamedTuple):
    """What a layout did."""

    losses: list[float]
    """Four steps, the last two after a resume."""
    grad_norms: list[float]
    others: list[float]
    """z, balance loss and BatchHet of the four steps, one after the other."""
    directory: Path
    """The run, with the checkpoint of step 2."""


def ledger_config(
    directory: Path, dtype: str, overrides: Iterable[str] = (), *, dit: bool = False
) -> RunConfig:
    """A small model with every kind of layer, and steps that make every term of the loss count."""
    return load_any_config(
        ROOT / "configs" / ("ledger_dit.toml" if dit else "ledger.toml"),
        [
            f"{'images' if dit else 'data'}.cache_dir={directory / 'cache'}",
            f"train.precision={dtype}",
            f"optim.muon.dtype={dtype}",
            *overrides,
        ],
    )


def axes_as_overrides(axes: dict[str, object]) -> list[str]:
    """``[parallel]`` overrides of the command line."""
    return [f"parallel.{name}={str(value).lower()}" for name, value in axes.items()]


def world_size_of(axes: dict[str, object]) -> int:
    """Ranks of a layout that names all its axes."""
    size = 1
    for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        size *= int(str(axes.get(name, 1)))
    return size


def train(config: RunConfig, directory: Path, num_steps: int, *, resume: bool) -> list[list[float]]:
    """Losses, gradient norms and the other numbers of the next steps; saves after them.

    Runs on every rank.
    """
    run = open_run(config, directory, torch.device("cpu"), resume=resume)
    if config.model.is_image and not resume:
        _stir(run)
    losses, norms, others = [], [], []
    for _ in range(num_steps):
        pending = train_step(
            run.model,
            run.optimizers,
            run.next_microbatches(),
            config,
            after_update=run.follow_weights,
        )
        result = pending.result()
        run.advance(result.num_tokens)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        others += [result.z, result.balance_loss, result.batch_het]
    run.save()
    return [losses, norms, others]


def _stir(run: Run) -> None:
    """Move all weights away from where they start: a diffusion transformer's blocks begin as the
    identity before a head of zeros, and would hardly take part in two steps."""
    for name, parameter in run.model.named_parameters():
        before = local_tensor(parameter).detach().clone()
        fill_normal(parameter.data, 0.1, f"stir/{name}")
        local_tensor(parameter).data.add_(before)


def run_layout(
    directory: Path,
    dtype: str,
    axes: dict[str, object],
    overrides: Iterable[str] = (),
    *,
    dit: bool = False,
) -> Outcome:
    """Two steps, a checkpoint, new processes, two steps more."""
    overrides = [*axes_as_overrides(axes), *overrides]
    config = ledger_config(directory.parent, dtype, overrides, dit=dit)
    create_run_directory(directory, config)
    world_size = world_size_of(axes)

    def leg(resume: bool) -> list[list[float]]:
        if world_size == 1:
            return train(config, directory, 2, resume=resume)
        return on_ranks(world_size, _leg, config, directory, resume)[0]

    first, second = leg(False), leg(True)
    merged = [earlier + later for earlier, later in zip(first, second, strict=True)]
    return Outcome(*merged, directory=directory)


def _leg(config: RunConfig, directory: Path, resume: bool) -> list[list[float]]:
    return train(config, directory, 2, resume=resume)


def compare(outcome: Outcome, single: Outcome) -> dict[str, float]:
    """The largest relative difference in each column."""
    differences = {
        "loss": _worst(outcome.losses[:2] + outcome.others, single.losses[:2] + single.others),
        "gradient norm": _worst(outcome.grad_norms[:2], single.grad_norms[:2]),
        "resumed": _worst(
            outcome.losses[2:] + outcome.grad_norms[2:], single.losses[2:] + single.grad_norms[2:]
        ),
        "parameters": 0.0,
        "optimizer state": 0.0,
        "SMEBU state": 0.0,
    }
    ours, theirs = _checkpoint(outcome.directory), _checkpoint(single.directory)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        column = _column(name)
        if column is not None:
            scale = tensor.double().abs().max().clamp(min=1e-30)
            difference = (ours[name].double() - tensor.double()).abs().max() / scale
            differences[column] = max(differences[column], float(difference))
    return differences


def _column(name: str) -> str | None:
    if name.endswith((".expert_bias", ".bias_momentum")):
        return "SMEBU state"
    kinds = {"model.": "parameters", "ema.": "parameters", "optim.": "optimizer state"}
    return next((column for prefix, column in kinds.items() if name.startswith(prefix)), None)


def _checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of step 2."""
    path = directory / "checkpoints/step-00000002"
    return load_tensors(path, stored_names(path))


def _worst(ours: list[float], theirs: list[float]) -> float:
    # BatchHet is a small difference of losses: near zero, what counts is the size of a loss.
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(ours, theirs, strict=True))


def render(table: dict[str, dict[str, float]], dtype: str) -> list[str]:
    """The table in Markdown; a cell beyond the tolerance says so."""
    lines = [
        f"| layout ({dtype}) | ranks | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for name, row in table.items():
        cells = [
            f"{row[column]:.0e}" + ("" if row[column] <= TOLERANCE[dtype] else " **wrong**")
            for column in COLUMNS
        ]
        lines.append(f"| {name} | {world_size_of(axes_of(name)[0])} | {' | '.join(cells)} |")
    return lines


def axes_of(name: str) -> tuple[dict[str, object], list[str]]:
    """Axes and overrides of a row."""
    return VARIANTS[name] if name in VARIANTS else ({**LAYOUTS, **DIT}[name], [])


def _save(table: dict[str, dict[str, float]], dtype: str) -> None:
    """Replace these rows; keep the others."""
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = saved.get(dtype, {}).get("rows", {}) | table
    rows = {name: known[name] for name in (*LAYOUTS, *VARIANTS, *DIT) if name in known}
    ranks = {name: world_size_of(axes_of(name)[0]) for name in rows}
    saved[dtype] = {"torch": torch.__version__, "ranks": ranks, "rows": rows}
    RESULTS.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Print the table; the exit status is the number of layouts with a wrong cell."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*LAYOUTS, *VARIANTS, *DIT], metavar="LAYOUT")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="fp64")
    parser.add_argument("--save", action="store_true", help=f"keep the numbers in {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        singles: dict[tuple[str, ...], Outcome] = {}
        print("\n".join(render({}, options.dtype)))
        for number, name in enumerate(options.only):
            axes, overrides = axes_of(name)
            dit = name in DIT
            key = ("dit" if dit else "lm", *overrides)
            if key not in singles:
                singles[key] = run_layout(
                    root / f"single{len(singles)}", options.dtype, {}, overrides, dit=dit
                )
            place = root / f"layout{number}"
            outcome = run_layout(place, options.dtype, axes, overrides, dit=dit)
            table[name] = compare(outcome, singles[key])
            print(render({name: table[name]}, options.dtype)[-1], flush=True)
    if options.save:
        _save(table, options.dtype)
    return sum(max(row.values()) > TOLERANCE[options.dtype] for row in table.values())


if __name__ == "__main__":
    raise SystemExit(main())
