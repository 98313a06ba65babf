"""What a block keeps of a microbatch for its backward: inputs of every operator that needs them.

Counted are the operators of trinity/ops and trinity/nn with the kernels of GPUs, not compiled;
tests/plan compares with what autograd saves.
"""

from __future__ import annotations

from trinity.nn.modulation import NUM_MODULATIONS
from trinity.plan.case import Case
from trinity.plan.mixers import MixerShape
from trinity.plan.shapes import BlockShape

FP32 = 4


def saved_bytes(case: Case, kind: BlockShape, mode: str, imbalance: float = 1.0) -> float:
    """Bytes that one block keeps of one microbatch.

    "none": inputs of every operator that needs them. "selective": the block's input and results of
    matrix products and of fused attention. "full": the block's input.
    """
    stream = case.stream_tokens * case.shape.config.hidden_size
    if mode == "full":
        return case.compute_bytes * stream
    saved = _feed_forward(case, kind, mode, imbalance) * case.compute_bytes
    if kind.mixer.output:
        saved += _mixer(case, kind.mixer, mode)
    if case.shape.config.is_image and mode == "none":
        saved += _modulation(case, kind)
    return saved


def _mixer(case: Case, mixer: MixerShape, mode: str) -> float:
    """Of the mixer between its two norms, their inputs included."""
    element, width = case.compute_bytes, case.shape.config.hidden_size
    stream, normed = case.stream_tokens * width, case.tokens * width
    heads = case.tokens / case.layout.tp  # tokens x the share of heads that is here
    q_k = heads * (mixer.query + mixer.key)
    value, out = heads * mixer.value, heads * mixer.output
    gate = out if mixer.is_gated else 0
    statistics = mixer.ways * FP32 * heads * (mixer.num_heads + mixer.saved_states)
    if mode == "selective":
        # Projections, the result of fused attention, the output projection; block input.
        kept = out if mixer.is_fused else 0
        return element * (2 * stream + q_k + value + gate + kept) + statistics
    if mixer.family == "attention":
        # Input, normed input (gathered), q and k before and after their norms, v, result of
        # attention, gate, gated result, output projection.
        elements = 2 * stream + normed + 2 * q_k + value + out + 2 * gate
        return element * elements + _mask(case, mixer) + statistics
    # Of each way the inputs of convolutions, q, k and v, and what steps leave of v.
    way = 2 * (q_k + value) + (value if mixer.takes_steps else 0)
    after = out  # what enters the output projection
    if mixer.family == "mamba2":  # activations keep their inputs; then the gate and what it scales
        way += q_k + value
        after += 3 * out
    if mixer.ways == 2:
        after += out  # what is scaled and added
    exact = mixer.ways * mixer.num_rates * normed
    if mixer.norm_groups > case.layout.tp:
        exact += 2 * out  # groups are normed in fp32, out of place
    elif mixer.norm_groups:
        after += out
    elements = 2 * stream + normed + mixer.ways * way + after
    return element * elements + FP32 * exact + statistics


def _mask(case: Case, mixer: MixerShape) -> float:
    """Who sees whom, as numbers that are added to scores, in every layer where not all see all; and
    there every query head gets keys and values of its own."""
    is_masked = not mixer.is_causal and (mixer.window is not None or case.is_packed)
    if not is_masked:
        return 0.0
    tokens, layout = case.tokens, case.layout
    repeated = tokens * layout.cp * 2 * (mixer.query - mixer.key) / layout.tp
    return case.compute_bytes * (tokens * case.config.batch.sequence_length + repeated)


def _modulation(case: Case, kind: BlockShape) -> float:
    """What is shifted and scaled, the branch that a gate scales; where images share a row, six
    modulations of every token, two of them plus one, and noise levels in fp32 for the router."""
    width = case.shape.config.hidden_size
    stream = case.stream_tokens * width
    halves = (kind.mixer.output > 0) + (kind.feed_forward != "none")
    elements = 2 * halves * stream
    if not case.is_packed:
        return case.compute_bytes * elements
    elements += (NUM_MODULATIONS + halves) * stream
    exact = case.moe_tokens * width if kind.has_experts else 0
    return case.compute_bytes * elements + FP32 * exact


def _feed_forward(case: Case, kind: BlockShape, mode: str, imbalance: float) -> float:
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
