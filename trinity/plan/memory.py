"""Memory of a rank, by kind.

What lasts through a step: fp32 master weights, gradients, optimizer state. What passes: gathered
parameters, saved activations, the working set of the block at hand, buffers of exchanges, the
vocabulary loss; and, when those are gone, the working memory of Newton-Schulz.

Weights, gradients and optimizer state are exact (tests/plan compares them with a real build).
Activations follow what the operators of trinity/ops save for the backward, in bytes per token and
block (:mod:`trinity.plan.activations`); compiled code may save less.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from trinity.core.config import Config
from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import ModelConfig
from trinity.nn.modulation import NUM_MODULATIONS
from trinity.optim.muon import MAX_BUCKET_ELEMENTS
from trinity.parallel.mesh import Layout
from trinity.plan.activations import saved_bytes
from trinity.plan.case import Case, StagePart
from trinity.plan.hardware import Efficiency, Gpu
from trinity.plan.shapes import Sizes, sizes

NEWTON_SCHULZ_BYTES = 20
"""Per element of a bucket: direction, stack and normalised copy in fp32, two copies and the
result in bf16, parts of which live at different times."""
FP32 = 4


class Memory(NamedTuple):
    """Bytes on the fullest rank."""

    weights: int
    """fp32 master weights, sharded."""
    gradients: int
    """Sharded, or unsharded in the reduce type where they stay through the step."""
    optimizer: int
    """Muon's momentum, AdamW's two moments and step counters."""
    average: int
    """Of the weights, where the configuration asks for one."""
    gathered: int
    """Parameters in the compute type, with gathers and reductions in flight."""
    activations: int
    """What blocks keep for the backward, of all microbatches on their way."""
    working_set: int
    """One block in its backward: what recompute brings back, and gradients of activations."""
    dispatch: int
    """Rows on their way to and from experts, with a margin for an uneven router."""
    ends: int
    """Chunks of logits and gradients of the head; of images their patches and vectors."""
    newton_schulz: int
    """Working memory of the optimizer, or of the average, which takes the place of what passes."""
    runtime: int
    """CUDA context, NCCL, kernels."""

    @property
    def lasting(self) -> int:
        """What is there at any time."""
        return self.weights + self.gradients + self.optimizer + self.average + self.runtime

    @property
    def passing(self) -> int:
        """What comes and goes with microbatches."""
        return (
            self.gathered
            + self.activations
            + self.working_set
            + self.dispatch
            + max(0, self.ends - self.working_set - self.dispatch)
        )

    @property
    def total(self) -> int:
        """The peak."""
        return self.lasting + max(self.passing, self.newton_schulz)


def usable_bytes(gpu: Gpu, efficiency: Efficiency) -> int:
    """What a plan may fill."""
    return int(gpu.hbm_bytes * efficiency.usable_memory)


def peak_memory(case: Case, efficiency: Efficiency) -> Memory:
    """The memory of the fullest pipeline rank."""
    seen, ranks = set(), []
    for pp_rank, part in enumerate(case.parts):
        # Of ranks with equal parts the first has most microbatches on their way.
        if part not in seen:
            seen.add(part)
            ranks.append(rank_memory(case, efficiency, pp_rank))
    return max(ranks, key=lambda memory: memory.total)


def rank_memory(case: Case, efficiency: Efficiency, pp_rank: int = 0) -> Memory:
    """The memory of one pipeline rank; of ranks that share a stage the first has the most."""
    part = case.parts[pp_rank]
    held = part_sizes(part, case.layout)
    saved, working, dispatch = _activations(case, part, efficiency)
    average = case.state_bytes * held.stored if case.config.ema.decay else 0
    return Memory(
        weights=case.state_bytes * held.stored,
        gradients=_gradients(case, held),
        optimizer=optimizer_bytes(case, held),
        average=average,
        gathered=_gathered(case, part),
        activations=int(saved * _microbatches_in_flight(case, pp_rank)),
        working_set=int(working),
        dispatch=int(dispatch),
        ends=_ends(case, part),
        # Moving the average takes a copy of it, when the optimizer is done.
        newton_schulz=max(_newton_schulz(part, case.layout), average),
        runtime=int(efficiency.runtime_bytes),
    )


@lru_cache(maxsize=4096)
def part_sizes(part: StagePart, layout: Layout) -> Sizes:
    """Elements of all parameters of a pipeline rank."""
    total = sizes(part.ends.weights, layout)
    for kind, count in part.kinds:
        total += kind.sizes(layout).times(count)
    return total


def optimizer_bytes(case: Case, held: Sizes) -> int:
    """One momentum for Muon; two moments and a 4-byte counter per tensor for AdamW."""
    adamw = 2 * (held.stored - held.muon) * case.state_bytes + held.num_adamw * FP32
    return held.muon * case.state_bytes + adamw


def _gradients(case: Case, held: Sizes) -> int:
    if case.is_resident and case.num_microbatches > 1 and case.layout.world_size > 1:
        # Summed over microbatches where they arise; the shards are made one group at a time.
        return case.reduce_bytes * held.gathered
    return case.state_bytes * held.stored


def _gathered(case: Case, part: StagePart) -> int:
    """Parameters in the compute type, and what is in flight."""
    groups = _gathered_elements(part, case.layout)
    kept = case.state_bytes * groups.exact
    if case.layout.world_size == 1:
        # Autocast keeps a cast copy of every weight until the forward is over.
        return kept + case.compute_bytes * groups.all
    # The flat buffer a gather fills before it is split, and one a reduction is fed from.
    in_flight = (case.compute_bytes + case.reduce_bytes) * max(groups.largest, groups.end)
    exact_ends = case.state_bytes * groups.exact_ends
    if case.is_resident:
        return kept + case.compute_bytes * groups.all + exact_ends + in_flight
    # This block and the next one, which is prefetched; embedding or head besides.
    passing = case.compute_bytes * (2 * groups.block + groups.end) + exact_ends
    return kept + passing + in_flight


class _Gathered(NamedTuple):
    """Elements of FSDP groups when gathered."""

    all: int
    """Of blocks and ends, but for what is gathered in fp32."""
    block: int
    """The largest block, matrices and experts."""
    largest: int
    """The largest group of a block."""
    end: int
    """The largest group of the ends."""
    exact_ends: int
    """Of the ends in fp32."""
    exact: int
    """Of the blocks in fp32."""


@lru_cache(maxsize=4096)
def _gathered_elements(part: StagePart, layout: Layout) -> _Gathered:
    total = exact = block = largest = 0
    for kind, count in part.kinds:
        matrices = kind.sizes(layout, "matrices").gathered
        experts = kind.sizes(layout, "experts").gathered
        total += count * (matrices + experts)
        exact += count * kind.sizes(layout, "exact").gathered
        block, largest = max(block, matrices + experts), max(largest, matrices, experts)
    ends = [(group.sizes(layout).gathered, group.is_exact) for group in part.ends.groups]
    narrow, exact_ends = (sum(n for n, is_exact in ends if is_exact is e) for e in (False, True))
    end = max([0, *(size for size, _ in ends)])
    return _Gathered(total + narrow, block, largest, end, exact_ends, exact)


def _activations(case: Case, part: StagePart, efficiency: Efficiency) -> tuple[float, float, float]:
    """Bytes that a microbatch leaves behind, of the block at hand, and of rows on their way."""
    mode = case.config.train.recompute
    saved = working = dispatch = 0.0
    for kind, count in part.kinds:
        everything = saved_bytes(case, kind, "none", efficiency.router_imbalance_memory)
        saved += count * saved_bytes(case, kind, mode, efficiency.router_imbalance_memory)
        # Gradients of activations are about as large again, but only some live at once.
        extra = everything if mode != "none" else 0.0
        working = max(working, extra + everything / 2)
        if kind.has_experts and case.layout.ep > 1:
            rows = case.moe_tokens * case.shape.config.num_experts_per_tok
            width = case.shape.config.hidden_size * case.compute_bytes
            dispatch = 2 * rows * width * (1 + efficiency.router_imbalance_memory)
    hidden = case.stream_tokens * case.shape.config.hidden_size * case.compute_bytes
    if part.has_last:
        saved += 3 * hidden  # the norm's input and output, the gradient that the loss keeps
    if case.is_packed:  # what the blocks share of their modulations, and the noise level
        saved += (NUM_MODULATIONS + 1) * hidden
    return saved, working, dispatch


def _microbatches_in_flight(case: Case, pp_rank: int) -> float:
    """Forward passes that wait for their backward, in whole ranks' worth of layers."""
    pp, num = case.layout.pp, case.num_microbatches
    if pp == 1:
        return 1.0
    schedule, per_rank = case.config.parallel.pp_schedule, case.stages_per_rank
    if schedule == "1f1b":
        return float(min(num, pp - pp_rank))
    if schedule == "interleaved_1f1b":
        warmup = (per_rank - 1) * pp + 2 * (pp - pp_rank - 1)
        return min(num * per_rank, warmup + 1) / per_rank
    # Folded into a V, every rank holds as much as the first of 1f1b (arXiv 2401.10241, section 6).
    return float(min(num, pp + (1 if schedule == "dualpipev" else 0)))


def _ends(case: Case, part: StagePart) -> int:
    config = case.shape.config
    if isinstance(config, DiTConfig):
        return _image_ends(case, config, part)
    assert isinstance(config, ModelConfig)
    return _vocabulary(case, config) if part.has_last else 0


def _image_ends(case: Case, config: DiTConfig, part: StagePart) -> int:
    """Noisy patches and targets of all microbatches, which every stage is given, with what comes
    out of each size of patches, and its error."""
    patches = case.tokens * config.patch_values[-1] * FP32
    outputs = 2 + 2 * len(config.patch_scales) if part.has_last else 0
    return patches * (2 * case.num_microbatches + outputs)


def _vocabulary(case: Case, config: ModelConfig) -> int:
    """One chunk of logits twice, the head's gradient in fp32 and two products in bf16."""
    assert isinstance(case.config, Config)
    words = config.vocab_size // case.layout.tp
    chunk = min(case.config.loss.chunk_rows, case.tokens)
    logits = chunk * words * (FP32 + case.compute_bytes)
    return logits + words * config.hidden_size * (FP32 + 2 * case.compute_bytes)


@lru_cache(maxsize=4096)
def _newton_schulz(part: StagePart, layout: Layout) -> int:
    """Of the largest bucket: matrices of one shape up to a limit, one tensor at least."""
    largest = 0
    buckets: dict[tuple[int, ...], int] = {}
    for kind, count in part.kinds:
        for weight in kind.weights:
            if not weight.is_muon:
                continue
            ranks = weight.muon_axes(layout)
            local = math.prod(weight.local_shape(layout))
            elements = local if ranks == 1 else math.prod(weight.gathered_shape(layout))
            elements = -(-elements // ranks) if ranks > 1 else local
            largest = max(largest, local, elements)
            key = (*weight.shape[-2:], ranks)
            buckets[key] = buckets.get(key, 0) + count * max(local, elements)
    bucket = min(MAX_BUCKET_ELEMENTS, max(buckets.values(), default=0))
    return NEWTON_SCHULZ_BYTES * max(largest, bucket)
