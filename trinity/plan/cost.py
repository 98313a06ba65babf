"""How long a step takes: three answers for a layout on a machine.

``serial``   nothing overlaps: the sum of all computing and all communication.
``bound``    everything overlaps: the longest of computing, NVLink and RDMA, and the pipeline's
             bubble and the optimizer on top. No run should beat it.
``step``     the prediction: this engine's overlap. FSDP's gathers and reductions hide under the
             computing of the microbatches in which they happen, except that a pipeline reduces
             after its last one. Sending rows hides under the shared expert. All other exchanges
             stand in the way. What is not listed is a constant factor, ``other``.

Per microbatch a block costs its forward (:mod:`trinity.plan.compute`), a backward twice as long,
and what recompute repeats: everything ("full"), or all but products and fused attention
("selective"). The slowest pipeline rank sets the pace.

Bubbles (F, B, W: seconds of forward, backward, and weight gradients in it, per rank and microbatch;
sums run over ranks): 1f1b and interleaved (sum (F + B) - max) / stages per rank (arXiv 2104.04473);
zbv (pp - 1) max(0, F + B - 3 W) (arXiv 2401.10241); dualpipev (pp - 1) (F + 2 B - 3 W) / 2
(DeepSeek's DualPipe page, with overlapped F&B taken as F + B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from trinity.plan.case import Case, StagePart
from trinity.plan.compute import (
    Machine,
    block_time,
    end_time,
    optimizer_s,
    parameter_passes_s,
)
from trinity.plan.flops import model_flops_per_token
from trinity.plan.hardware import Efficiency, Gpu, load_efficiency
from trinity.plan.traffic import Traffic, step_traffic


class Stack(NamedTuple):
    """What a training program does that changes the count. The default is this program."""

    gemm: Literal["bf16", "fp8"] = "bf16"
    hides_dispatch: bool = False
    """Rows travel under the computing of other microbatches."""
    hides_tensor: bool = False
    """Tensor-parallel exchanges are cut up and run beside the products they belong to."""
    one_copy_per_node: bool = False
    """A token crosses the network once for all its experts on a node."""
    max_nodes: int = 0
    """Nodes that a token's experts may lie on; 0: any number."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one optimizer step and where they go; bytes of one rank."""

    parts: dict[str, float]
    """Seconds by cause on the slowest rank; they add up to ``step_s``."""
    serial_s: float
    bound_s: float
    traffic: tuple[Traffic, ...]
    tokens: int
    """Of the whole step."""
    world_size: int
    flops_per_token: float
    """Of the model, forward and backward, recompute not counted."""
    peak_flops: float
    """bf16, per rank."""

    @property
    def step_s(self) -> float:
        """Predicted seconds per step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens per second and GPU."""
        return self.tokens / self.world_size / self.step_s

    @property
    def bound_tokens_per_s(self) -> float:
        """The same if everything overlapped."""
        return self.tokens / self.world_size / self.bound_s

    @property
    def mfu(self) -> float:
        """Model FLOPs over the bf16 peak."""
        return self.tokens_per_s * self.flops_per_token / self.peak_flops

    def microseconds_per_token(self, part: str) -> float:
        """GPU-microseconds that a part takes per token."""
        return self.parts[part] * 1e6 * self.world_size / self.tokens


class RankTime(NamedTuple):
    """Seconds of one microbatch on one pipeline rank."""

    products: float
    attention: float
    passes: float
    router: float
    ends: float
    recompute: float
    launch: float
    shared: float
    """Part of products: the shared experts' forward."""
    forward: float
    weight_gradient: float

    @property
    def compute(self) -> float:
        """All of it."""
        listed = self.products + self.attention + self.passes + self.router + self.ends
        return listed + self.recompute + self.launch


def step_cost(
    case: Case, gpu: Gpu, efficiency: Efficiency | None = None, stack: Stack | None = None
) -> Cost:
    """Predict a step of ``case``."""
    efficiency, stack = efficiency or load_efficiency(), stack or Stack()
    machine = Machine(gpu, efficiency, stack.gemm)
    ranks = _ranks(case, machine, stack)
    slowest = max(ranks, key=lambda rank: rank.busy_s)
    bubble = bubble_s(
        case.config.parallel.pp_schedule,
        [rank.stage_times(with_traffic=True) for rank in ranks],
        case.stages_per_rank,
    )
    least_bubble = bubble_s(
        case.config.parallel.pp_schedule,
        [rank.stage_times(with_traffic=False) for rank in ranks],
        case.stages_per_rank,
    )
    after = max(ranks, key=lambda rank: rank.optimizer_s + rank.link_s("muon"))
    parts = {**slowest.parts(), "bubble": bubble}
    parts["optimizer"] = after.optimizer_s + after.link_s("muon")
    busy = sum(parts.values())
    parts["other"] = busy / efficiency.other - busy
    communication = sum(slowest.entry_s(entry) for entry in slowest.traffic)
    return Cost(
        parts=parts,
        serial_s=slowest.compute_s + communication + bubble + after.optimizer_s,
        bound_s=max(slowest.compute_s, *slowest.busy_links()) + least_bubble + after.optimizer_s,
        traffic=tuple(slowest.traffic),
        tokens=case.config.batch.rows_per_step * case.config.batch.sequence_length,
        world_size=case.layout.world_size,
        flops_per_token=model_flops_per_token(case),
        peak_flops=gpu.bf16_flops,
    )


def _ranks(case: Case, machine: Machine, stack: Stack) -> list[_Rank]:
    """All pipeline ranks; those with the same part are one object."""
    known: dict[StagePart, _Rank] = {}
    ranks = []
    for part in case.parts:
        if part not in known:
            known[part] = _Rank(case, machine, stack, part)
        ranks.append(known[part])
    return ranks


class StageTime(NamedTuple):
    """Seconds of a microbatch on one rank, as a pipeline schedule sees them."""

    forward: float
    backward: float
    """All of it: recompute, gradients of activations and of weights."""
    weight: float
    """Gradients of weights, which zero-bubble schedules put off."""


def bubble_s(schedule: str, stages: Sequence[StageTime], stages_per_rank: int = 1) -> float:
    """Seconds per step in which the slowest rank waits for the pipeline to fill and to drain."""
    if len(stages) == 1:
        return 0.0
    forward = [stage.forward for stage in stages]
    both = [stage.forward + stage.backward for stage in stages]
    if schedule in ("1f1b", "interleaved_1f1b"):
        return (sum(both) - max(both)) / stages_per_rank
    num = len(stages) - 1
    f, b = sum(forward) / len(stages), sum(both) / len(stages) - sum(forward) / len(stages)
    w = sum(stage.weight for stage in stages) / len(stages)
    # The pace is that of the slowest rank; the others' spare time does not shorten the step.
    if schedule == "zbv":
        return num * max(0.0, f + b - 3 * w)
    return num * max(0.0, f + 2 * b - 3 * w) / 2


class _Rank:
    """Everything about one pipeline rank."""

    def __init__(self, case: Case, machine: Machine, stack: Stack, part: StagePart) -> None:
        self.case, self.machine, self.stack, self.part = case, machine, stack, part
        self.time = _rank_time(case, machine, part)
        traffic = step_traffic(case, machine.gpu, part)
        self.traffic = [self._as_sent(entry) for entry in traffic]
        self.parameter_passes_s = parameter_passes_s(case, machine, part)
        self.optimizer_s = optimizer_s(case, machine, part)

    @cached_property
    def compute_s(self) -> float:
        """Computing of a step, the optimizer apart."""
        return self.case.num_microbatches * self.time.compute + self.parameter_passes_s

    @cached_property
    def busy_s(self) -> float:
        """Computing and exchanges that stand in its way."""
        return self.compute_s + sum(self._exposed.values())

    def parts(self) -> dict[str, float]:
        """Seconds by cause, without bubble, optimizer and other."""
        num, time = self.case.num_microbatches, self.time
        return {
            "products": num * time.products,
            "attention": num * time.attention,
            "router": num * time.router,
            "passes": num * time.passes,
            "ends": num * time.ends,
            "recompute": num * time.recompute,
            "launch": num * time.launch,
            "parameter copies": self.parameter_passes_s,
            **self._exposed,
            "gather and reduce": self._parameter_traffic_s(),
        }

    def stage_times(self, *, with_traffic: bool) -> StageTime:
        """Per microbatch, for the bubble; exchanges are half forward, half backward."""
        num, time = self.case.num_microbatches, self.time
        extra = sum(self._exposed.values()) / num if with_traffic else 0.0
        share = time.forward / time.compute
        return StageTime(
            time.forward + extra * share,
            time.compute - time.forward + extra * (1 - share),
            time.weight_gradient,
        )

    def entry_s(self, entry: Traffic) -> float:
        """Seconds of one kind of collective per step, alone on the links."""
        gpu, share = self.machine.gpu, self.machine.efficiency
        rdma = share.rdma_all_to_all if entry.kind == "all-to-all" else share.rdma
        bandwidth_s = max(
            entry.nvlink_bytes / (gpu.nvlink_bandwidth * share.nvlink),
            entry.rdma_bytes / (gpu.rdma_bandwidth * rdma),
        )
        start = share.collective_start_s + share.collective_doubling_s * math.log2(entry.group_size)
        return bandwidth_s + entry.num_calls * start

    def link_s(self, purpose: str) -> float:
        """Seconds of all collectives for a purpose."""
        return sum(self.entry_s(entry) for entry in self.traffic if entry.purpose == purpose)

    def busy_links(self) -> tuple[float, float]:
        """Seconds that NVLink and RDMA are busy, whatever for."""
        gpu, share = self.machine.gpu, self.machine.efficiency
        nvlink = sum(entry.nvlink_bytes for entry in self.traffic)
        rdma = sum(
            entry.rdma_bytes / (share.rdma_all_to_all if entry.kind == "all-to-all" else share.rdma)
            for entry in self.traffic
        )
        return nvlink / (gpu.nvlink_bandwidth * share.nvlink), rdma / gpu.rdma_bandwidth

    @cached_property
    def _exposed(self) -> dict[str, float]:
        dispatch = self.link_s("dispatch")
        num = self.case.num_microbatches
        if self.stack.hides_dispatch:
            tax = self.machine.efficiency.overlap_tax
            dispatch = _beside(dispatch, num * self.time.compute, tax)
        elif self.case.config.parallel.dispatcher == "all_to_all":
            # On the way there, in both directions: half of it, under the shared experts.
            dispatch -= min(dispatch / 2, num * 3 * self.time.shared)
        tensor = self.link_s("tensor")
        if self.stack.hides_tensor:
            tensor = _beside(tensor, num * self.time.products, self.machine.efficiency.overlap_tax)
        return {
            "tensor": tensor,
            "context": self.link_s("context"),
            "dispatch": dispatch,
            "pipeline": self.link_s("pipeline"),
        }

    def _parameter_traffic_s(self) -> float:
        """What gathers and reductions add to the step."""
        gather, reduce = self.link_s("gather"), self.link_s("reduce")
        tax = self.machine.efficiency.overlap_tax
        if not self.case.is_resident:
            return _beside(gather + reduce, self.busy_s, tax)
        once = self.busy_s / self.case.num_microbatches
        share = self.time.forward / self.time.compute
        if self.case.layout.pp > 1:
            return _beside(gather, once * share, tax) + reduce
        return _beside(gather, once * share, tax) + _beside(reduce, once * (1 - share), tax)

    def _as_sent(self, entry: Traffic) -> Traffic:
        """Fewer bytes over RDMA where a token crosses once for all experts of a node."""
        is_deep = self.case.config.parallel.dispatcher == "deep_ep"
        if entry.purpose != "dispatch" or not (self.stack.one_copy_per_node or is_deep):
            return entry
        choices = self.case.shape.config.num_experts_per_tok
        near = self.machine.gpu.members_per_node(entry.group_size, 1)
        nodes = entry.group_size / near
        touched = nodes * (1 - (1 - 1 / nodes) ** choices)
        if self.stack.max_nodes:
            touched = min(touched, self.stack.max_nodes)
        return entry._replace(rdma_bytes=entry.rdma_bytes * touched / self.case.rows_per_token)


def _beside(communication_s: float, compute_s: float, tax: float) -> float:
    """What communication adds to computing that it runs beside."""
    hidden = min(communication_s, compute_s)
    return communication_s - hidden + tax * hidden


def _rank_time(case: Case, machine: Machine, part: StagePart) -> RankTime:
    mode = case.config.train.recompute
    products = attention = passes = router = recompute = shared = launch = 0.0
    for kind, count in part.kinds:
        block = block_time(case, machine, kind)
        products += count * (block.products - block.router)
        attention += count * block.attention
        passes += count * block.passes
        router += count * block.router
        shared += count * block.shared
        launch += count * machine.efficiency.block_launch_s
        if mode == "full":
            recompute += count * (block.products + block.attention + block.passes)
        elif mode == "selective":  # fused attention is kept, that of windows and scans are not
            again = 0.0 if kind.mixer.is_fused else block.attention
            recompute += count * (block.passes + again)
    ends = sum(end_time(case, machine, part))
    compute = 3 * (products + attention + passes + router) + recompute + ends
    return RankTime(
        products=3 * products,
        attention=3 * attention,
        passes=3 * passes,
        router=3 * router,
        ends=ends,
        recompute=recompute,
        launch=max(0.0, launch - compute),
        shared=shared,
        # The loss of words forms its gradient in the forward.
        forward=products + attention + passes + router + ends,
        weight_gradient=products + router,
    )
