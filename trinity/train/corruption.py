"""Silent data corruption: hardware that computes wrongly and says nothing.

Two checks, each at a cost that is paid at intervals. A *replay* does the passes of a step again and
compares results: it finds arithmetic that is not the same twice. *Replicas* are parameters of which
several ranks hold copies: it finds memory that has changed. A fault that gives one wrong result
every time is found by neither on the rank that has it; other hardware must repeat the step.

Both are called by all ranks, and tell all ranks the same.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trinity.core import job
from trinity.core.batch import AnyBatch
from trinity.core.sharding import local_tensor
from trinity.models.staged import LossSums
from trinity.parallel.model import ParallelModel
from trinity.parallel.stage import StepCounts

T = TypeVar("T")
GPU_TOLERANCE = 1e-4
"""Relative difference of loss sums and gradient norms that is still called equal on a GPU, where
sums are formed in an order that varies. On a CPU every bit counts."""
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = 1 << 20
"""Elements hashed at a time; bounds the working memory."""


# Replay of a step


Verdict = Literal["same", "replay", "step", "persistent"]
MEANINGS: dict[Verdict, str] = {
    "replay": "transient, in the replay: the step itself is good",
    "step": "transient, in the step: it is not applied",
    "persistent": "persistent: leave this host out",
}


class Replay(NamedTuple):
    """What a replayed step has shown."""

    verdict: Verdict
    """Where the fault was; "same" for none."""
    lines: tuple[str, ...]
    """One for each rank that differs."""

    @property
    def spoils_step(self) -> bool:
        """Whether the step must not be applied."""
        return self.verdict in ("step", "persistent")


class _Pass(NamedTuple):
    """What one run of a step's microbatches came to on this rank."""

    losses: list[list[LossSums]]
    gradients: list[Tensor | None]
    sums: Tensor
    """Loss sums of every microbatch, fp64."""
    norm: Tensor
    """Of the gradients that are here, fp64 (1,)."""
    bits: Tensor
    """Hashes of the gradients and of the experts' loads, int64."""
    trace: list[tuple[str, Tensor]]
    """Hashes of what left each block and of the gradient that came back, as they were made."""


class _Finding(NamedTuple):
    """What a rank has seen in three runs: the step's own and two more."""

    host: str
    is_own: bool
    """Not only sums with other ranks, but losses or activations of this one differ."""
    third_is_step: bool
    third_is_second: bool
    place: str
    """Where two replays first differ; empty where they do not."""


def replay_mismatches(
    model: ParallelModel,
    microbatches: Sequence[AnyBatch],
    counts: StepCounts,
    *,
    tolerance: float | None = None,
) -> Replay:
    """Repeat the passes of the step that was just made, and say where the results differ.

    Call between ``model.pipeline.forward_backward(microbatches, counts)`` and whatever uses its
    results: ``stage.losses`` and gradients must be as that left them. So they are afterwards, as
    are weights, buffers and random numbers: training goes on as if nobody had asked.

    Costs one more forward and backward, and memory for a second set of gradients. Only after a
    difference there is a third run, to tell who erred:

    - *transient, in the replay*: the third run agrees with the step, which can be trusted;
    - *transient, in the step*: the third run agrees with the second; skip the step;
    - *persistent*: all three differ; stop, and leave the host out.

    Returns the verdict and a line for each rank that differs, the same on all ranks. Where some
    ranks' own losses or activations differ, only they are named: gradients that ranks add up differ
    on all of them. (A fault in the backward of the step itself has left no trace but those.)

    Args:
        tolerance: relative difference of losses and gradient norm that counts as equal; by default
            0, where every bit of every gradient counts, on a CPU, and ``GPU_TOLERANCE`` on a GPU.
    """
    if tolerance is None:
        tolerance = GPU_TOLERANCE if model.device.type == "cuda" else 0.0
    step = _taken(model, [])
    try:
        second = _again(model, microbatches, counts)
        differs = not _agree(step, second, tolerance)
        if not any(_from_all_ranks(differs)):
            return Replay("same", ())
        third = _again(model, microbatches, counts)
        finding = _Finding(
            host=platform.node(),
            is_own=not _agree_in_sums(step, second, tolerance)
            or not _agree_in_sums(second, third, tolerance),
            third_is_step=_agree(third, step, tolerance),
            third_is_second=_agree(third, second, tolerance),
            place="" if tolerance else _first_difference(second.trace, third.trace),
        )
        return _verdict(_from_all_ranks(finding))
    finally:
        _give_back(model, step)


def _taken(model: ParallelModel, trace: list[tuple[str, Tensor]]) -> _Pass:
    """Take losses and gradients out of the model."""
    losses = [stage.take_losses() for stage in model.stages]
    gradients: list[Tensor | None] = []
    for parameter in model.parameters():
        gradients.append(parameter.grad)
        parameter.grad = None
    parts = [local_tensor(gradient) for gradient in gradients if gradient is not None]
    sums, bits = [], [bit_hash(part) for part in parts]
    for loss in (loss for of_stage in losses for loss in of_stage):
        sums += [loss.error.double(), loss.z.double(), loss.balance_loss.double()]
        bits.append(bit_hash(loss.load_LE))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    norm = torch.stack(norms).norm().view(1)
    return _Pass(losses, gradients, torch.stack(sums), norm, torch.stack(bits), trace)


def _give_back(model: ParallelModel, result: _Pass) -> None:
    for stage, losses in zip(model.stages, result.losses, strict=True):
        stage.losses = losses
    for parameter, gradient in zip(model.parameters(), result.gradients, strict=True):
        parameter.grad = gradient


def _again(model: ParallelModel, microbatches: Sequence[AnyBatch], counts: StepCounts) -> _Pass:
    trace: list[tuple[str, Tensor]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _tracing(model, trace):
        model.pipeline.forward_backward(microbatches, counts)
    return _taken(model, trace)


@contextlib.contextmanager
def _tracing(model: ParallelModel, trace: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Hash what leaves every block, and the gradient of that, inside the ``with`` block."""

    def note(name: str, x: Tensor) -> None:
        trace.append((name, bit_hash(x)))

    def after(layer: str, _block: nn.Module, _args: Any, out: tuple[Tensor, ...]) -> None:
        note(f"the output of layer {layer}", out[0])
        if out[0].requires_grad:
            out[0].register_hook(partial(note, f"the gradient that reaches layer {layer}"))

    with contextlib.ExitStack() as stack:
        for stage in model.stages:
            for layer, block in stage.model.backbone.layers.items():
                stack.enter_context(block.register_forward_hook(partial(after, layer)))
        yield


def _agree(one: _Pass, other: _Pass, tolerance: float) -> bool:
    if tolerance:
        return _agree_in_sums(one, other, tolerance) and torch.allclose(
            one.norm, other.norm, rtol=tolerance, atol=0, equal_nan=True
        )
    return _agree_in_sums(one, other, 0.0) and torch.equal(one.bits, other.bits)


def _agree_in_sums(one: _Pass, other: _Pass, tolerance: float) -> bool:
    return torch.allclose(one.sums, other.sums, rtol=tolerance, atol=0, equal_nan=True)


def _first_difference(one: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> str:
    pairs = zip(one, other, strict=True)
    return next((name for (name, a), (_, b) in pairs if not torch.equal(a, b)), "")


def _verdict(findings: list[_Finding]) -> Replay:
    """Conclusion and lines for people, out of what each rank has seen."""
    verdict: Verdict = "persistent"
    if all(finding.third_is_step for finding in findings):
        verdict = "replay"
    elif all(finding.third_is_second for finding in findings):
        verdict = "step"
    lines: dict[bool, list[str]] = {True: [], False: []}
    for rank, (host, is_own, third_is_step, third_is_second, place) in enumerate(findings):
        if third_is_step and third_is_second:
            continue
        where = f", first in {place}" if place else ""
        line = f"rank {rank} ({host}): the same step gave other results{where}; {MEANINGS[verdict]}"
        lines[is_own or bool(place)].append(line)
    return Replay(verdict, tuple(lines[True] or lines[False]))


# Replicas of parameters


def replica_mismatches(model: ParallelModel) -> list[str]:
    """Compare what several ranks hold copies of, parameters and balancing state, bit by bit.

    Copies are what hybrid sharding (``dp_replicate``) and tensor parallelism (norms, routers,
    shared experts) leave on several ranks, and the routers' buffers, which every rank of a pipeline
    stage has. What is sharded over all ranks has no copy to be compared with.

    Call between steps. Reads every local parameter once and sends a hash of each; returns a line
    for each tensor of which copies differ, the same lines on all ranks.
    """
    if model.meshes is None:
        return []
    tensors = {name: t for name, t in model.state_dict().items() if _copied_along(t)}
    hashes = {name: bit_hash(local_tensor(tensor)) for name, tensor in tensors.items()}
    differing = []
    for axis in ("dp_replicate", "fsdp", "tp", "expert_fsdp", "ep"):
        names = [name for name, tensor in tensors.items() if axis in _copied_along(tensor)]
        if names:
            own = torch.stack([hashes[name] for name in names])
            differing.append(_differing(model, axis, names, own))
    every_name = sorted(set().union(*_from_all_ranks(set().union(*differing))))
    if not every_name:
        return []
    mine = {
        name: (_part_of(tensors[name]), int(hashes[name])) for name in every_name if name in tensors
    }
    copies: dict[Any, dict[int, list[int]]] = {}
    for rank, found in enumerate(_from_all_ranks(mine)):
        for name, (part, value) in found.items():
            copies.setdefault((name, part), {}).setdefault(value, []).append(rank)
    return [
        _describe(name, sorted(by_hash.values(), key=len))
        for (name, _), by_hash in sorted(copies.items())
        if len(by_hash) > 1
    ]


def _copied_along(tensor: Tensor) -> tuple[str, ...]:
    """Mesh axes whose ranks hold the same values; a buffer is the same all over a stage."""
    if not isinstance(tensor, DTensor):
        return ("dp_replicate", "fsdp", "tp")
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names
    assert names is not None
    return tuple(
        name
        for name, size, placement in zip(names, mesh.shape, tensor.placements, strict=True)
        if size > 1 and placement.is_replicate()
    )


def _differing(model: ParallelModel, axis: str, names: list[str], own: Tensor) -> set[str]:
    """Names of which the hashes differ along an axis: the smallest is not the largest."""
    assert model.meshes is not None
    both = torch.stack((own, ~own))  # the largest is the complement of the smallest complement
    dist.all_reduce(both, dist.ReduceOp.MIN, group=model.meshes.group_along((axis,)))
    return {name for name, (low, high) in zip(names, both.T.tolist(), strict=True) if low != ~high}


def _part_of(tensor: Tensor) -> tuple[int, ...]:
    """Which part of a tensor is here: the same on ranks that should hold the same values."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    axes = zip(coordinate, tensor.placements, strict=True)
    return tuple(index for index, placement in axes if not placement.is_replicate())


def _describe(name: str, copies: list[list[int]]) -> str:
    """``copies``: ranks by what they hold, the most common last."""
    odd = sorted(rank for ranks in copies[:-1] for rank in ranks)
    if len(copies[-1]) > len(copies[-2]):
        return f"{name}: values on {_ranks(odd)} differ from those on {_ranks(copies[-1])}"
    everyone = sorted(rank for ranks in copies for rank in ranks)
    return f"{name}: values on {_ranks(everyone)} differ, and none have a majority"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# What both stand on


def bit_hash(tensor: Tensor) -> Tensor:
    """A 64-bit number of all bits of a tensor and their places, int64 on its device.

    Any single flipped bit changes it: every element counts with an odd factor of its own, modulo
    2^64. The order of summation does not matter, so it is exact on every device.
    """
    flat = tensor.detach().contiguous().flatten()
    words = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    factor = torch.arange(min(len(words), CHUNK_ELEMENTS), device=words.device) * 2 + 1
    for start in range(0, len(words), CHUNK_ELEMENTS):
        chunk = words[start : start + CHUNK_ELEMENTS].long()
        total += (factor[: len(chunk)] + 2 * start).mul_(chunk).sum()
    return total


def _from_all_ranks(value: T) -> list[T]:
    """Every rank's value, by rank."""
    if job.world_size() == 1:
        return [value]
    every: list[Any] = [None] * job.world_size()
    dist.all_gather_object(every, value)
    return every
