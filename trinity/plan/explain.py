"""Why one layout is faster than another, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from trinity.plan.cost import Cost
from trinity.plan.memory import part_sizes
from trinity.plan.search import Candidate
from trinity.plan.traffic import totals

GB = 1e9
MIN_DIFFERENCE_US = 0.3
"""Parts that differ by less, in GPU-microseconds per token, are not worth a word."""
SENTENCES = {
    "products": "Matrix products",
    "attention": "Attention",
    "passes": "Passes over activations",
    "ends": "Embedding, head and loss",
    "recompute": "Recompute",
    "parameter copies": "Copying parameters and gradients",
    "tensor": "Tensor-parallel exchanges",
    "context": "Context-parallel exchanges",
    "dispatch": "Rows to and from experts",
    "pipeline": "Passing hidden states on",
    "bubble": "The pipeline bubble",
    "optimizer": "The optimizer",
    "launch": "Waiting for kernel launches",
}


def explain(winner: Candidate, baseline: Candidate, ranking: Sequence[Candidate] = ()) -> str:
    """One paragraph on what ``winner`` gains over ``baseline``, in GPU-microseconds per token.

    Of the ``ranking``, what the baseline's layout could do with other settings is told as well.
    """
    new, old = winner.cost, baseline.cost
    if winner is baseline:
        return (
            f"{winner}: predicted {new.tokens_per_s:,.0f} tokens/s/GPU, {_us(new):.1f} "
            "GPU-microseconds per token."
        )
    ratio = new.tokens_per_s / old.tokens_per_s
    sentences = [
        f"{winner}: predicted {new.tokens_per_s:,.0f} tokens/s/GPU, {ratio:.2f} times the "
        f"{old.tokens_per_s:,.0f} of {baseline}. A token takes {_us(new):.1f} GPU-microseconds "
        f"instead of {_us(old):.1f}.",
    ]
    if winner.case.layout.world_size > 1:
        sentences.append(_parameters(winner, baseline))
    changes = []
    for part, name in SENTENCES.items():
        before, after = old.microseconds_per_token(part), new.microseconds_per_token(part)
        if abs(after - before) >= MIN_DIFFERENCE_US:
            changes.append((before - after, f"{name}: {before:.1f} to {after:.1f}."))
    sentences += [text for _, text in sorted(changes, key=lambda change: -abs(change[0]))]
    same = next((c for c in ranking if c.case.layout == baseline.case.layout), None)
    if same is not None and same.case.layout != winner.case.layout:
        sentences.append(
            f"Without changing the layout, {same} is predicted at {same.cost.tokens_per_s:,.0f}."
        )
    return " ".join(sentences)


def _us(cost: Cost) -> float:
    return 1e6 / cost.tokens_per_s


def _parameters(winner: Candidate, baseline: Candidate) -> str:
    """What happens to parameters and gradients, the largest matter of sharded training."""
    before = baseline.cost.microseconds_per_token("gather and reduce")
    after = winner.cost.microseconds_per_token("gather and reduce")
    moved, moves = _parameter_bytes(baseline), _parameter_bytes(winner)
    text = (
        f"Gathering parameters and reducing gradients moves {moves / GB:,.0f} GB per GPU and step "
        f"instead of {moved / GB:,.0f} and adds {after:.1f} microseconds instead of {before:.1f}"
    )
    held, holds = _gathered(baseline), _gathered(winner)
    case, other = winner.case, baseline.case
    if case.is_resident and not other.is_resident:
        return (
            f"{text}, because experts and all other parameters stay where they are used: a rank "
            f"computes with {holds / GB:.1f} billion parameters, which it gathers "
            f"{_times(case.gathers_per_step)} and reduces once per step, where it computed with "
            f"{held / GB:.1f} billion, gathered {_times(other.gathers_per_step)} and reduced "
            f"{_times(other.reduces_per_step)}."
        )
    return (
        f"{text}: {holds / GB:.1f} billion parameters gathered {_times(case.gathers_per_step)} per "
        f"step, against {held / GB:.1f} billion {_times(other.gathers_per_step)}."
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _parameter_bytes(candidate: Candidate) -> float:
    sums = totals(list(candidate.cost.traffic), lambda entry: entry.purpose)
    return sum(sum(sums.get(purpose, (0.0, 0.0))) for purpose in ("gather", "reduce"))


def _gathered(candidate: Candidate) -> int:
    """Parameters that a rank computes with, at most."""
    case = candidate.case
    return max(part_sizes(part, case.layout).gathered for part in case.parts)
