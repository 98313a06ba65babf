"""Memory of a rank, by kind.

What lasts through a step: fp32 master weights, gradients, optimizer state. What passes: gathered
parameters, saved activations, the working set of the block at hand, buffers of exchanges, the
vocabulary loss; and, when those are gone, the working memory of Newton-Schulz.

Weights, gradients and optimizer state are exact (tests/plan compares them with a real build).
Activations follow what the operators of trinity/ops save for the backward, in bytes per token and
block; compiled code may save less.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from trinity.optim.muon import MAX_BUCKET_ELEMENTS
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case, StagePart
from trinity.plan.hardware import Efficiency, Gpu
from trinity.plan.shapes import BlockShape, Sizes, sizes

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
    gathered: int
    """Parameters in the compute type, with gathers and reductions in flight."""
    activations: int
    """What blocks keep for the backward, of all microbatches on their way."""
    working_set: int
    """One block in its backward: what recompute brings back, and gradients of activations."""
    dispatch: int
    """Rows on their way to and from experts, with a margin for an uneven router."""
    vocabulary: int
    """Chunks of logits and gradients of the head."""
    newton_schulz: int
    """Working memory of the optimizer, which takes the place of what passes."""
    runtime: int
    """CUDA context, NCCL, kernels."""

    @property
    def lasting(self) -> int:
        """What is there at any time."""
        return self.weights + self.gradients + self.optimizer + self.runtime

    @property
    def passing(self) -> int:
        """What comes and goes with microbatches."""
        return (
            self.gathered
            + self.activations
            + self.working_set
            + self.dispatch
            + max(0, self.vocabulary - self.working_set - self.dispatch)
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
    return Memory(
        weights=case.state_bytes * held.stored,
        gradients=_gradients(case, held),
        optimizer=optimizer_bytes(case, held),
        gathered=_gathered(case, part),
        activations=int(saved * _microbatches_in_flight(case, pp_rank)),
        working_set=int(working),
        dispatch=int(dispatch),
        vocabulary=_vocabulary(case) if part.has_head else 0,
        newton_schulz=_newton_schulz(part, case.layout),
        runtime=int(efficiency.runtime_bytes),
    )


@lru_cache(maxsize=4096)
def part_sizes(part: StagePart, layout: Layout) -> Sizes:
    """Elements of all parameters of a pipeline rank."""
    total = sizes((*part.ends.words, *part.ends.norms), layout)
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
    in_flight = (case.compute_bytes + case.reduce_bytes) * max(groups.largest, groups.words)
    if case.is_resident:
        return kept + case.compute_bytes * groups.all + in_flight
    # This block and the next one, which is prefetched; embedding or head besides.
    return kept + case.compute_bytes * (2 * groups.block + groups.words) + in_flight


class _Gathered(NamedTuple):
    """Elements of FSDP groups when gathered."""

    all: int
    """Of blocks, embedding and head."""
    block: int
    """The largest block, matrices and experts."""
    largest: int
    """The largest group of a block."""
    words: int
    """The larger of embedding and head."""
    exact: int


@lru_cache(maxsize=4096)
def _gathered_elements(part: StagePart, layout: Layout) -> _Gathered:
    total = exact = block = largest = 0
    for kind, count in part.kinds:
        matrices = kind.sizes(layout, "matrices").gathered
        experts = kind.sizes(layout, "experts").gathered
        total += count * (matrices + experts)
        exact += count * kind.sizes(layout, "exact").gathered
        block, largest = max(block, matrices + experts), max(largest, matrices, experts)
    words = [sizes((weight,), layout).gathered for weight in part.ends.words]
    return _Gathered(total + sum(words), block, largest, max([0, *words]), exact)


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
    if part.has_head:
        saved += 3 * hidden  # the norm's input and output, the gradient that the loss keeps
    return saved, working, dispatch


def saved_bytes(case: Case, kind: BlockShape, mode: str, imbalance: float = 1.0) -> float:
    """What one block keeps of one microbatch for the backward, bytes.

    "none": inputs of every operator that needs them. "selective": the block's input and results of
    matrix products and of fused attention. "full": the block's input.
    """
    config, attention, layout = case.shape.config, kind.mixer, case.layout
    width, element = config.hidden_size, case.compute_bytes
    stream = case.stream_tokens * width
    if mode == "full":
        return element * stream
    heads = case.tokens / layout.tp  # tokens x the share of heads that is here
    q_k = heads * (attention.query + attention.key)
    value, out = heads * attention.value, heads * attention.output
    gate = out if attention.is_gated else 0
    if mode == "selective":
        # Projections, the result of fused attention, the output projection; block input.
        kept = out if attention.window is None and attention.sees_tokens else 0
        mixer = stream + q_k + value + gate + kept + stream
    else:
        # Input, normed input (gathered), q and k before and after their norms, v, result of
        # attention, gate, gated result, output projection.
        mixer = stream + case.tokens * width + 2 * q_k + value + out + 2 * gate + stream
    if not attention.sees_tokens:  # convolutions keep their inputs
        mixer += q_k + value if mode == "none" else 0
    if not attention.output:
        mixer = 0.0
    statistics = FP32 * heads * (attention.num_heads + attention.saved_states)
    ffn = _ffn_elements(case, kind, mode, imbalance)
    return element * (mixer + ffn) + statistics


def _ffn_elements(case: Case, kind: BlockShape, mode: str, imbalance: float) -> float:
    config = case.shape.config
    width = config.hidden_size
    stream = case.stream_tokens * width
    if kind.feed_forward == "none":
        return 0.0
    if not kind.has_experts:
        hidden = case.tokens / case.layout.tp * config.intermediate_size
        if mode == "selective":
            return 2 * hidden + stream
        return stream + case.tokens * width + 4 * hidden + stream
    tokens = case.moe_tokens
    rows = tokens * config.num_experts_per_tok * imbalance
    shared = tokens * config.moe_intermediate_size * config.num_shared_experts
    inner = rows * config.moe_intermediate_size
    scores = 2 * tokens * config.num_experts  # fp32, in elements of two bytes
    if mode == "selective":
        return scores + 2 * shared + stream + 2 * inner + rows * width
    # Input, normed input and its fp32 copy for the router; scores, also for the balance loss.
    router = stream + 3 * tokens * width + 3 * scores
    return router + 4 * shared + rows * width + 5 * inner + stream


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


def _vocabulary(case: Case) -> int:
    """One chunk of logits twice, the head's gradient in fp32 and two products in bf16."""
    config = case.shape.config
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
