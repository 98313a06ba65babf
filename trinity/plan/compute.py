"""What a rank computes: matrix products, attention, passes over memory, the optimizer.

Times of one microbatch and one block, forward only, in seconds; a backward takes twice as long (two
products for one, two passes for one) and a recompute as long again as what it repeats.

* A product of (t, n) with (n, m) takes 2 t n m FLOPs at ``gemm`` of the peak, less for thin ones:
  the factor is d / (d + half_dim) with d the smallest of t, n, m. The rows of an expert count as t.
* Attention takes 2 FLOPs per query channel and key inside the mask, and as many per output channel.
  That of images forms all scores of a row and masks them.
* The router's product runs in fp32 without tensor cores (see trinity/nn/router.py).
* Everything else is bound by memory: bytes read and written over the HBM bandwidth.
* Muon orthogonalises each matrix with 5 quintics: 20 m^2 n + 10 m^3 FLOPs for m <= n, or
  12 m^2 n + 22 m^3 where n >= 1.5 m (trinity/ops/newton_schulz.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from typing import Literal, NamedTuple

from trinity.core.config import Config
from trinity.core.dit_config import DiTConfig
from trinity.core.model_config import ModelConfig
from trinity.ops.newton_schulz import GRAM_MIN_ASPECT, GRAM_RESTART
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case, StagePart
from trinity.plan.hardware import Efficiency, Gpu
from trinity.plan.memory import part_sizes
from trinity.plan.mixers import MixerShape
from trinity.plan.shapes import BlockShape
from trinity.plan.traffic import muon_weights

MUON_PASS_BYTES = 60
"""Read and written per stored element by momentum, direction, normalisation and update, fp32."""
ADAMW_PASS_BYTES = 28
"""The same for fused AdamW: gradient, weight and two moments in, the last three out."""
CLIP_PASS_BYTES = 12
"""Norm and scaling of the gradients."""
LOSS_PASS_BYTES = 30
"""Per logit: written, widened, maximum, softmax, maximum, narrowed, read by two products."""
FP32 = 4


class Machine(NamedTuple):
    """Hardware, what programs get of it, and the type of the products."""

    gpu: Gpu
    efficiency: Efficiency
    gemm: Literal["bf16", "fp8"] = "bf16"

    def product_s(
        self, tokens: float, rows: float, columns: float, *, narrow: bool = True
    ) -> float:
        """Seconds of a (tokens, columns) x (columns, rows) product; ``narrow`` may use fp8."""
        share = self.efficiency
        smallest = min(tokens, rows, columns)
        thin = smallest / (smallest + share.gemm_half_dim)
        if self.gemm == "fp8" and narrow:
            rate = self.gpu.fp8_flops * share.gemm_fp8
        else:
            rate = self.gpu.bf16_flops * share.gemm_bf16
        return 2 * tokens * rows * columns / (rate * thin)

    def passes_s(self, num_bytes: float) -> float:
        """Seconds to read and write so many bytes of HBM."""
        return num_bytes / (self.gpu.hbm_bandwidth * self.efficiency.hbm)


class BlockTime(NamedTuple):
    """Forward seconds of one block and microbatch."""

    dense: float
    """Projections and dense feed-forward."""
    shared: float
    """Shared expert, which runs while rows travel."""
    experts: float
    attention: float
    router: float
    passes: float

    @property
    def products(self) -> float:
        """What selective recompute does not repeat."""
        return self.dense + self.shared + self.experts + self.router


def block_time(case: Case, machine: Machine, kind: BlockShape) -> BlockTime:
    """Forward time of a block on the rank of a context-parallel group that has most to do."""
    tp = case.layout.tp
    # This program's FP8 is for linears; experts follow only where the whole stack does.
    linears = machine if case.config.train.fp8 == "off" else machine._replace(gemm="fp8")
    dense = shared = experts = router = 0.0
    for weight in kind.weights:
        if weight.group == "matrices" and len(weight.shape) == 2:
            rows, columns = weight.gathered_shape(case.layout)
            if weight.name.startswith("ffn.shared."):
                shared += linears.product_s(case.moe_tokens, rows, columns)
            else:
                dense += linears.product_s(case.tokens, rows, columns)
        elif weight.group == "experts":
            experts += _expert_products_s(case, machine, weight.shape)
        elif weight.name.startswith("ffn.router."):
            is_time = weight.name.endswith("time_weight") and not case.is_packed
            levels = case.config.batch.microbatch_rows if is_time else case.moe_tokens
            router += _exact_product_s(machine, levels, math.prod(weight.shape))
    mixer = kind.mixer
    multiplies = mixer.ways * mixer.scan_multiplies
    if mixer.sees_tokens:
        multiplies += (mixer.query + mixer.output) * _busiest_keys(case, mixer)
    scores = 2 * multiplies * case.tokens / tp
    rate = machine.gpu.bf16_flops * machine.efficiency.attention
    return BlockTime(
        dense,
        shared,
        experts,
        scores / rate,
        router,
        machine.passes_s(pass_bytes(case, kind) * _eager(case, machine)),
    )


def _exact_product_s(machine: Machine, rows: float, elements: float) -> float:
    """Seconds of a product in fp32 with a matrix of so many elements."""
    return 2.0 * rows * elements / (machine.gpu.fp32_flops * machine.efficiency.gemm_fp32)


def _eager(case: Case, machine: Machine) -> float:
    return 1.0 if case.config.train.compile else machine.efficiency.eager_passes


def _expert_products_s(case: Case, machine: Machine, shape: tuple[int, ...]) -> float:
    """Grouped products; bound by reading the weights where experts get few rows."""
    config, layout = case.shape.config, case.layout
    rows, columns = shape[-2:]
    matrices = math.prod(shape[1:-2])
    routed = case.moe_tokens * config.num_experts_per_tok
    per_expert = routed * layout.ep / config.num_experts
    # Rows count as tokens: the efficiency is that of one expert, the work that of all.
    work = routed / per_expert * matrices * machine.product_s(per_expert, rows, columns)
    read = machine.passes_s(math.prod(shape) / layout.ep * case.compute_bytes)
    imbalance = machine.efficiency.router_imbalance_time if layout.ep > 1 else 1.0
    return max(work, read) * imbalance


def _busiest_keys(case: Case, mixer: MixerShape) -> float:
    """Keys held against a query on the rank that has most to do, on average."""
    if not mixer.is_causal:
        return case.config.batch.sequence_length
    if mixer.ways == 2:  # before it, and after it: all, itself twice
        return case.config.batch.sequence_length + 1
    return busiest_mean_keys(case, mixer.window)


def busiest_mean_keys(case: Case, window: int | None) -> float:
    """Keys that a query of the last context-parallel rank sees, on average."""
    length, cp = case.config.batch.sequence_length, case.layout.cp
    part = length // cp
    first = length - part
    reach = length if window is None else min(window, length)
    # Queries first .. length-1; query i sees min(i + 1, reach) keys.
    growing = max(0, min(length, reach) - first)
    total = growing * (2 * first + growing + 1) / 2 + (part - growing) * reach
    return total / part


def pass_bytes(case: Case, kind: BlockShape) -> float:
    """Bytes that the forward of one block and microbatch reads and writes besides products.

    Of compiled blocks: a norm reads and writes the stream, a closing norm also reads the branch;
    norms of q and k with positions, gates and activations are one pass each; rows are gathered to
    be sent, sorted on arrival, and added up on return.
    """
    config, mixer = case.shape.config, kind.mixer
    width = config.hidden_size
    heads = case.tokens / case.layout.tp
    halves = (mixer.output > 0) + (kind.feed_forward != "none")
    elements = 5 * halves * width * case.stream_tokens
    elements += 2 * heads * (mixer.query + mixer.key)
    elements += 3 * heads * mixer.output if mixer.is_gated else 0
    if not mixer.sees_tokens:  # values are convolved too
        elements += 2 * heads * mixer.value
    if mixer.ways == 2:  # flipped, convolved, flipped back and added
        streams = mixer.query + mixer.key + mixer.value
        elements += heads * (4 * streams + 4 * mixer.output)
    if config.is_image:
        elements += _modulation_elements(case, kind, halves)
    if kind.feed_forward == "none":
        pass
    elif not kind.has_experts:
        elements += 3 * case.tokens / case.layout.tp * config.intermediate_size
    else:
        tokens = case.moe_tokens
        rows = tokens * config.num_experts_per_tok
        hidden = config.moe_intermediate_size
        moves = 6 if case.layout.ep > 1 else 4
        elements += rows * (3 * hidden + moves * width)
        elements += tokens * (3 * hidden * config.num_shared_experts + 8 * width)
    return elements * case.compute_bytes


def _modulation_elements(case: Case, kind: BlockShape, halves: int) -> float:
    """Shift, scale and gate of every token where images share a row; and what routers see beside
    what experts do."""
    width = case.shape.config.hidden_size
    elements = 3 * halves * width * case.stream_tokens if case.is_packed else 0
    return elements + (2 * width * case.moe_tokens if kind.has_experts else 0)


class EndTime(NamedTuple):
    """Seconds of what comes before and after the blocks for one microbatch, forward and backward
    together."""

    products: float
    passes: float


def end_time(case: Case, machine: Machine, part: StagePart) -> EndTime:
    """Of the ends that are on a rank; looking up embeddings takes no time."""
    config = case.shape.config
    if isinstance(config, DiTConfig):
        return _image_end_time(case, config, machine, part)
    assert isinstance(config, ModelConfig)
    return _vocabulary_time(case, config, machine) if part.has_last else EndTime(0.0, 0.0)


def _image_end_time(case: Case, config: DiTConfig, machine: Machine, part: StagePart) -> EndTime:
    """Every size of patches is computed for all tokens. The vectors of images, in fp32, are
    computed by each rank that shares their rows."""
    tokens, width = case.moe_tokens, config.hidden_size
    products = passes = 0.0
    for values in config.patch_values:
        once = machine.product_s(tokens, values, width, narrow=False)
        products += 2 * once * part.has_first + 3 * once * part.has_last
        ends = part.has_first + part.has_last
        passes += 3 * ends * tokens * (width * case.compute_bytes + 2 * values * FP32)
    if part.has_first:
        matrices = [w for g in part.ends.groups if g.is_exact for w in g.weights]
        elements = sum(math.prod(w.shape) for w in matrices if ".classes." not in w.name)
        images = case.config.batch.microbatch_rows * case.images_per_row
        products += 3 * _exact_product_s(machine, images, elements)
    return EndTime(products, machine.passes_s(passes))


def _vocabulary_time(case: Case, config: ModelConfig, machine: Machine) -> EndTime:
    """Three products, passes over the logits, and the head's gradient once per chunk of rows."""
    assert isinstance(case.config, Config)
    chunk = min(case.config.loss.chunk_rows, case.tokens)
    words = config.vocab_size / case.layout.tp
    products = 3 * machine.product_s(case.tokens, words, config.hidden_size, narrow=False)
    chunks = case.tokens / chunk
    gradient = words * config.hidden_size * (2 * FP32 + 2 * case.compute_bytes)
    passes = LOSS_PASS_BYTES * case.tokens * words + (chunks * gradient if chunks > 1 else 0)
    return EndTime(products, machine.passes_s(passes))


def parameter_passes_s(case: Case, machine: Machine, part: StagePart) -> float:
    """Seconds per step of copying gathered parameters and gradients to and from buffers.

    A gather's result is copied out of its flat buffer, a gradient into one; a gradient that stays
    is added to the sum of those before.
    """
    held = part_sizes(part, case.layout).gathered
    if case.layout.world_size == 1:
        # Autocast's copy of the weights; gradients cast, and added to those before.
        casts = 2 * (FP32 + case.compute_bytes)
        return machine.passes_s(held * case.num_microbatches * (casts + 3 * FP32))
    gathers = case.gathers_per_step * 2 * case.compute_bytes
    reduces = case.reduces_per_step * (case.compute_bytes + case.reduce_bytes)
    sums = 0
    if case.is_resident and case.num_microbatches > 1:
        sums = case.num_microbatches * (case.compute_bytes + 2 * case.reduce_bytes)
    return machine.passes_s(held * (gathers + reduces + sums))


def optimizer_s(case: Case, machine: Machine, part: StagePart) -> float:
    """Seconds of Muon's products and of all passes over the state, exchanges apart."""
    return _optimizer_s(part, case.layout, machine, case.config.optim.muon.num_iterations)


@lru_cache(maxsize=4096)
def _optimizer_s(part: StagePart, layout: Layout, machine: Machine, num_iterations: int) -> float:
    held = part_sizes(part, layout)
    passes = held.muon * MUON_PASS_BYTES + (held.stored - held.muon) * ADAMW_PASS_BYTES
    passes += held.stored * CLIP_PASS_BYTES
    buckets: dict[tuple[int, int, int], float] = defaultdict(float)
    for weight, count in muon_weights(part):
        ranks = weight.muon_axes(layout)
        whole = weight.local_shape(layout) if ranks == 1 else weight.gathered_shape(layout)
        rows, columns = weight.shape[-2:]
        buckets[rows, columns, ranks] += count * math.prod(whole[:-2])
    work = 0.0
    for (rows, columns, ranks), matrices in buckets.items():
        flops = newton_schulz_flops(rows, columns, num_iterations)
        thin = min(rows, columns)
        rate = flops / (2.0 * thin**3) if thin else 0.0
        one = rate * machine.product_s(thin, thin, thin, narrow=False)
        work += math.ceil(matrices / ranks) * one
    return machine.passes_s(passes) + work


def newton_schulz_flops(rows: int, columns: int, num_iterations: int) -> float:
    """FLOPs to orthogonalise one matrix, in the cheaper of two forms."""
    m, n = min(rows, columns), max(rows, columns)
    if n < GRAM_MIN_ASPECT * m:
        return num_iterations * (4.0 * m * m * n + 2.0 * m**3)
    flops, left = 0.0, num_iterations
    while left > 0:
        segment = min(GRAM_RESTART, left)
        # Gram matrix and result; a polynomial each; products of polynomials; steps of the Gram.
        flops += 4.0 * m * m * n + 2.0 * m**3 * (segment + (segment - 1) + 2 * (segment - 1))
        left -= segment
    return flops
