"""What a rank's collectives move in a step: calls, bytes, and over which link.

Bytes are those that others send to this rank in a ring or a direct exchange: (N-1)/N of a gather's
result, of a reduction's or an exchange's input, twice that of an all-reduce's. They equal what
:mod:`trinity.plan.dry_run` counts on the real code.

Of a group with g members in each of n NVLink domains, a gathered tensor of S bytes enters a domain
once, through the network cards of its g members: S (n-1) / (n g) per rank over RDMA, and
S (g-1) / g over NVLink. An all-to-all sends each pair of ranks its own bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from trinity.optim.muon import MAX_BUCKET_ELEMENTS
from trinity.parallel.context import halo_positions
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case, StagePart
from trinity.plan.hardware import Gpu
from trinity.plan.shapes import Group, Sizes, Weight, sizes

FP32 = 4
MUON_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class Traffic(NamedTuple):
    """One kind of collective on one axis, for one purpose, in one step of one rank."""

    purpose: str
    """gather, reduce, tensor, dispatch, context, pipeline or muon."""
    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all or send."""
    axis: str
    group_size: int
    num_calls: int
    num_bytes: int
    """Received by this rank."""
    nvlink_bytes: float
    rdma_bytes: float


class _Axis(NamedTuple):
    name: str
    size: int
    stride: int
    """Distance of neighbours on the axis in the numbering of ranks."""


def axes(layout: Layout) -> dict[str, _Axis]:
    """Size and stride of every axis, from the numbering of :mod:`trinity.parallel.mesh`."""
    found = (
        _Axis("tp", layout.tp, 1),
        _Axis("cp", layout.cp, layout.tp),
        _Axis("fsdp", layout.fsdp, layout.tp),
        _Axis("fsdp x tp", layout.fsdp * layout.tp, 1),
        _Axis("ep", layout.ep, 1),
        _Axis("expert_fsdp", layout.expert_fsdp, layout.ep),
        _Axis("dp_replicate", layout.dp_replicate, layout.copy_size),
        _Axis("pp", layout.pp, layout.stage_size),
    )
    return {axis.name: axis for axis in found}


def step_traffic(case: Case, gpu: Gpu, part: StagePart) -> list[Traffic]:
    """Everything a rank with that part of the model receives in a step."""
    ledger = _Ledger(case.layout, gpu)
    _parameters(case, part, ledger)
    if case.layout.tp > 1:
        _tensor(case, part, ledger)
    if case.layout.cp > 1:
        _context(case, part, ledger)
    if case.layout.ep > 1:
        _dispatch(case, part, ledger)
    if case.layout.pp > 1:
        _pipeline(case, part, ledger)
    _muon(case, part, ledger)
    return list(ledger.entries())


class _Ledger:
    """Adds up calls and bytes by purpose, kind and axis."""

    def __init__(self, layout: Layout, gpu: Gpu) -> None:
        self.axes = axes(layout)
        self.gpu = gpu
        self.totals: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, purpose: str, kind: str, axis: str, whole_bytes: float, calls: float) -> None:
        """``calls`` collectives whose gathered result, or input, has ``whole_bytes`` each."""
        size = self.axes[axis].size
        if size == 1 or calls == 0 or whole_bytes == 0:
            return
        factor = 2 if kind == "all-reduce" else 1
        entry = self.totals[purpose, kind, axis]
        entry[0] += calls
        entry[1] += calls * (whole_bytes * factor * (size - 1) // size)

    def entries(self) -> Iterator[Traffic]:
        for (purpose, kind, name), (calls, num_bytes) in self.totals.items():
            axis = self.axes[name]
            near = self.gpu.members_per_node(axis.size, axis.stride)
            whole = num_bytes * axis.size / (axis.size - 1)  # twice the tensor for an all-reduce
            if kind == "send":
                is_near = near == axis.size
                nvlink, rdma = (num_bytes, 0.0) if is_near else (0.0, num_bytes)
            elif kind == "all-to-all":
                nvlink = whole * (near - 1) / axis.size
                rdma = whole * (axis.size - near) / axis.size
            else:
                nodes = axis.size / near
                nvlink = whole * (near - 1) / near
                rdma = whole * (nodes - 1) / (nodes * near)
            yield Traffic(purpose, kind, name, axis.size, int(calls), int(num_bytes), nvlink, rdma)


def _parameters(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """FSDP: one collective per block for its matrices and one for its experts."""
    norms = [sizes((weight,), case.layout) for weight in part.ends.norms]
    exact = _total(case, part, "exact")
    for kind, count in part.kinds:
        _group(case, ledger, kind.sizes(case.layout, "matrices"), "fsdp", count)
        _group(case, ledger, kind.sizes(case.layout, "experts"), "expert_fsdp", count)
    for group in part.ends.groups:
        _group(case, ledger, group.sizes(case.layout), "fsdp", 1, is_exact=group.is_exact)
    for held in (exact, *norms):
        _group(case, ledger, held, "fsdp", 1, is_exact=True, is_kept=True)


def _group(
    case: Case,
    ledger: _Ledger,
    held: Sizes,
    axis: str,
    count: int,
    *,
    is_exact: bool = False,
    is_kept: bool = False,
) -> None:
    """``is_exact``: gathered in fp32; ``is_kept``: and kept from forward to backward."""
    gathers = case.exact_gathers_per_step if is_kept else case.gathers_per_step
    gathered = case.state_bytes if is_exact else case.compute_bytes
    reduces = count * case.reduces_per_step
    ledger.add("gather", "all-gather", axis, gathered * held.gathered, count * gathers)
    ledger.add("reduce", "reduce-scatter", axis, case.reduce_bytes * held.gathered, reduces)
    ledger.add("reduce", "all-reduce", "dp_replicate", case.reduce_bytes * held.stored, reduces)


def _total(case: Case, part: StagePart, group: Group) -> Sizes:
    total = Sizes(0, 0, 0, 0)
    for kind, count in part.kinds:
        total += kind.sizes(case.layout, group).times(count)
    return total


def _tensor(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """In and out of each branch, forward, again on recompute, and transposed in the backward."""
    num, again = case.num_microbatches, case.forward_passes
    whole = case.tokens * case.shape.config.hidden_size * case.compute_bytes
    blocks = sum(count for _, count in part.kinds)
    dense = sum(count for kind, count in part.kinds if not kind.has_experts)
    branches, moe = blocks + dense, blocks - dense
    # Every rank has the ends of images whole.
    is_image = case.shape.config.is_image
    ends = 0 if is_image else part.has_first + part.has_last
    if case.config.parallel.sequence_parallel:
        calls = num * (branches * (again + 1) + ends)
        ledger.add("tensor", "all-gather", "tp", whole, calls)
        ledger.add("tensor", "reduce-scatter", "tp", whole, calls)
    else:
        ledger.add("tensor", "all-reduce", "tp", whole, num * (branches * (again + 1) + ends))
        # Outputs of experts; gradients of what experts are given, and routers of images too.
        gathers = moe * (again + 1)
        if is_image:
            gathers += moe * (1 + case.is_packed) + part.has_last
            if not case.is_packed:  # gradients of one noise level a row
                rows = case.config.batch.microbatch_rows
                level = rows * case.shape.config.hidden_size * case.compute_bytes
                ledger.add("tensor", "all-reduce", "tp", level, num * moe)
        ledger.add("tensor", "all-gather", "tp", whole, num * gathers)
    # Gradients of what all ranks hold and each used on its own positions.
    elements, weights = _uncut(part, case.layout)
    mean_bytes = case.reduce_bytes * elements / max(1, weights)
    ledger.add("tensor", "all-reduce", "tp", mean_bytes, weights * case.reduces_per_step)


@lru_cache(maxsize=4096)
def _uncut(part: StagePart, layout: Layout) -> tuple[int, int]:
    """Elements and number of the parameters that tensor parallelism does not cut."""
    elements = number = 0
    for kind, count in part.kinds:
        for weight in kind.weights:
            if weight.tp_dim is None and weight.group in ("matrices", "exact"):
                elements += count * sizes((weight,), layout).gathered
                number += count
    for group in part.ends.groups:
        for weight in group.weights:
            if weight.tp_dim is None:
                elements += sizes((weight,), layout).gathered
                number += 1
    return elements, number


def _context(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """Keys and values of earlier positions, or of images all of them, or states, and their
    gradients back. Of texts the last rank gets most; what is read both ways is even."""
    layout, batch = case.layout, case.config.batch
    positions = batch.sequence_length // layout.cp
    for kind, count in part.kinds:
        mixer = kind.mixer
        passes = count * case.num_microbatches * mixer.ways
        row = (mixer.key + mixer.value) // layout.tp * case.compute_bytes
        if mixer.sees_tokens and mixer.is_causal:
            _, receive = halo_positions(layout.cp - 1, layout.cp, positions, mixer.window)
            received = sum(receive) * batch.microbatch_rows * row / mixer.ways
            whole = received * layout.cp / (layout.cp - 1)
            ledger.add("context", "all-to-all", "cp", whole, passes * (case.forward_passes + 1))
            continue
        gathered = layout.cp * batch.microbatch_rows * FP32 * mixer.state / layout.tp
        if mixer.sees_tokens:
            gathered = batch.microbatch_rows * batch.sequence_length * row
        ledger.add("context", "all-gather", "cp", gathered, passes * case.forward_passes)
        ledger.add("context", "reduce-scatter", "cp", gathered, passes)


def _dispatch(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """Rows to their experts and back, with fp32 routing weights on the way there."""
    config = case.shape.config
    rows = case.moe_tokens * case.rows_per_token
    layers = sum(count for kind, count in part.kinds if kind.has_experts)
    passes = layers * case.num_microbatches * (case.forward_passes + 1)
    states = rows * config.hidden_size * case.compute_bytes
    ledger.add("dispatch", "all-to-all", "ep", states, 2 * passes)
    ledger.add("dispatch", "all-to-all", "ep", rows * FP32, passes)


def _pipeline(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """Hidden states from the stage before, their gradients from the stage after."""
    boundaries = 2 * case.stages_per_rank - part.has_first - part.has_last
    positions = case.stream_tokens + case.extra_positions
    hidden = positions * case.shape.config.hidden_size * case.compute_bytes
    pp = case.layout.pp
    # Not a share of a collective: all of it is received.
    whole = hidden * pp / (pp - 1)
    ledger.add("pipeline", "send", "pp", whole, boundaries * case.num_microbatches)


def _muon(case: Case, part: StagePart, ledger: _Ledger) -> None:
    """Matrices to the rank that orthogonalises them and back, averaged over the ranks."""
    element = MUON_BYTES[case.config.optim.muon.dtype]
    for axis, stored in _muon_stored(part, case.layout):
        calls = 2 * math.ceil(stored / MAX_BUCKET_ELEMENTS)
        ledger.add("muon", "all-to-all", axis, 2 * element * stored / calls, calls)


@lru_cache(maxsize=4096)
def _muon_stored(part: StagePart, layout: Layout) -> list[tuple[str, int]]:
    """Axis and stored elements of each set of matrices that travel together."""
    buckets: dict[tuple[object, ...], int] = defaultdict(int)
    for weight, count in muon_weights(part):
        if weight.muon_axes(layout) == 1:
            continue
        held = sizes((weight,), layout)
        # Matrices travel together when they have one shape and are cut in one way.
        cut = weight.tp_dim if layout.tp > 1 else None
        key = (_muon_axis(weight, layout), weight.shape[-2:], cut, len(weight.shape))
        buckets[key] += count * held.stored
    return [(str(axis), stored) for (axis, *_), stored in buckets.items()]


def muon_weights(part: StagePart) -> Iterator[tuple[Weight, int]]:
    """Weights that Muon moves, with how many blocks have one like it."""
    for kind, count in part.kinds:
        for weight in kind.weights:
            if weight.is_muon:
                yield weight, count


def _muon_axis(weight: Weight, layout: Layout) -> str:
    if weight.group == "experts":
        return "expert_fsdp"
    if weight.tp_dim is None or layout.tp == 1:
        return "fsdp"
    return "fsdp x tp" if layout.fsdp > 1 else "tp"


def totals(traffic: list[Traffic], key: Callable[[Traffic], str]) -> dict[str, tuple[float, float]]:
    """NVLink and RDMA bytes by any key."""
    sums: dict[str, tuple[float, float]] = {}
    for entry in traffic:
        nvlink, rdma = sums.get(key(entry), (0.0, 0.0))
        sums[key(entry)] = (nvlink + entry.nvlink_bytes, rdma + entry.rdma_bytes)
    return sums
