"""Instruments of a sampled step: norms and moves by kind of parameter, routers, logits, stragglers.

Every number is that of the whole model and the whole step, whatever the layout, but for three,
which are of a sample: outputs of experts (the first rows that each gets of a microbatch), logits of
the head and of attention (evenly spread positions of each microbatch). With context parallelism the
sample is that of one process where a rank's positions are a multiple of the distance between
samples. Maxima and means are over all microbatches.

A model of images has no vocabulary: its readings lack the logits of the head.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.core import job
from trinity.core.sharding import local_tensor, num_copies
from trinity.nn.moe import MoE
from trinity.optim.clip import square_sum
from trinity.optim.groups import MATRIX, ROUTER, TABLE_LIKE, VECTOR, OptimizerSet
from trinity.parallel.model import ParallelModel
from trinity.train.probe_hooks import ForwardProbes
from trinity.train.probe_work import FixedWork, Waiting

KINDS = {MATRIX: "matrix", ROUTER: "router", TABLE_LIKE: "table", VECTOR: "vector"}
SATURATED_BIAS = 1.0
"""A router score is at most 1: a bias of this size outweighs any."""
SILENT_SHARE = 1e-3
"""Of the median expert's output; what says less is silent."""


class Reading(NamedTuple):
    """What :func:`values` makes numbers of, on its way to the host; equal on all ranks."""

    sums: Tensor
    maxima: Tensor
    arrived: torch.Event | None
    """When the copies to the host are done; None where there are none to be made."""
    sum_sizes: dict[str, int]
    max_sizes: dict[str, int]
    num_experts: int
    has_drift: bool
    """Whether there was a reading before this one."""


class Probes:
    """Measures a step::

        with probes.arriving():
            ...                 # the step's first sum over all ranks
        with probes.measuring():
            model.pipeline.forward_backward(microbatches, counts)
        probes.before_update()  # before clipping
        ...                     # the optimizers and the biases move, or the step is skipped
        probes.after_update()
        record = values(probes.reading())

    All ranks call it for the same steps. Until :func:`values`, nothing waits for the device. What
    is trained does not change by a bit. Costs memory for a copy of this rank's parameters between
    ``before_update`` and ``after_update``, when activations are gone.
    """

    def __init__(self, model: ParallelModel, optimizers: OptimizerSet) -> None:
        self.model = model
        self.forward = ForwardProbes(model)
        self.work = FixedWork(model.device)
        self.waiting = Waiting(model.device)
        named = optimizers.parameters
        self._by_kind = {
            key: [named[row.name] for row in optimizers.rows if row.kind == kind]
            for kind, key in KINDS.items()
        }
        self._routers = [
            (row, moe.router, [named[name] for name in names])
            for (row, moe), names in zip(model.moe_rows(), _router_names(model), strict=True)
        ]
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._before: dict[str, list[Tensor]] | None = None
        self._biases_before: list[Tensor] = []
        self._last_routers: list[list[Tensor]] | None = None
        self._has_drift = False

    def arriving(self) -> contextlib.AbstractContextManager[None]:
        """Around the step's first collective of all ranks. May be left out: no ``late_ms`` then."""
        return self.waiting.timed()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the forward and backward passes of the step."""
        self.forward.reset()
        with self.forward.installed():
            yield

    @torch.no_grad()
    def before_update(self) -> None:
        """When all gradients are there and nothing has touched them."""
        device = self.model.device
        self._sums, self._maxima = dict(self.forward.sums), dict(self.forward.maxima)
        self._before = {}
        for key, parameters in self._by_kind.items():
            here = [local_tensor(p) for p in parameters]
            self._before[key] = [part.clone() for part in here]
            self._sums[f"grad_{key}"] = square_sum(parameters).to(device).view(1)
            self._sums[f"weight_{key}"] = self._squares(here, parameters)
        self._biases_before = [router.expert_bias.clone() for _, router, _ in self._routers]
        self.work.run()

    @torch.no_grad()
    def after_update(self) -> None:
        """When parameters and biases have moved, or the step was skipped."""
        assert self._before is not None, "before_update() comes first"
        for key, parameters in self._by_kind.items():
            moves = self._before[key]
            if moves:
                torch._foreach_sub_(moves, [local_tensor(p) for p in parameters])
            self._sums[f"update_{key}"] = self._squares(moves, parameters)
        self._before = None
        self._measure_biases()
        self._measure_drift()

    def forget(self) -> None:
        """After weights were replaced (a rewind): the next reading has no router drift."""
        self._last_routers = None

    def _measure_biases(self) -> None:
        layers = (len(self.model.config.model.moe_layers),)
        for name in ("bias_norm", "bias_step", "bias_saturation"):
            self._maxima[name] = _filled(self.model.device, layers, -torch.inf)
        for (row, router, _), before in zip(self._routers, self._biases_before, strict=True):
            bias_E = router.expert_bias.double()
            self._maxima["bias_norm"][row] = _root_mean_square(bias_E)
            self._maxima["bias_step"][row] = _root_mean_square(bias_E - before)
            saturated = (bias_E.abs() >= SATURATED_BIAS).double().mean()
            self._maxima["bias_saturation"][row] = saturated

    def _measure_drift(self) -> None:
        layers = (len(self.model.config.model.moe_layers),)
        self._sums["drift"] = _filled(self.model.device, layers, 0.0)
        self._sums["router_weight"] = _filled(self.model.device, layers, 0.0)
        now = [[local_tensor(p) for p in parameters] for _, _, parameters in self._routers]
        # No rank may leave this out: with a pipeline, some have no router.
        self._has_drift = self._last_routers is not None
        last = self._last_routers or [[torch.full_like(p, torch.nan) for p in own] for own in now]
        for (row, _, parameters), own, earlier in zip(self._routers, now, last, strict=True):
            self._sums["router_weight"][row] = self._squares(own, parameters)[0]
            moves = torch._foreach_sub(own, earlier)
            self._sums["drift"][row] = self._squares(moves, parameters)[0]
        self._last_routers = [[part.clone() for part in own] for own in now]

    def _squares(self, parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """This rank's share of the sum of squares of ``parts`` of ``parameters``, fp64 (1,)."""
        total = _filled(self.model.device, (1,), 0.0)
        by_copies: dict[int, list[Tensor]] = {}
        for part, parameter in zip(parts, parameters, strict=True):
            by_copies.setdefault(num_copies(parameter), []).append(part)
        for copies, group in by_copies.items():
            wide = torch.promote_types(group[0].dtype, torch.float32)
            norms = torch.stack(torch._foreach_norm(group, 2.0, dtype=wide))
            total += norms.double().square().sum() / copies
        return total

    @torch.no_grad()
    def reading(self) -> Reading:
        """Add everything up over the ranks, in two collectives."""
        device, experts = self.model.device, self.model.config.model.num_experts
        sums = dict(self._sums)
        for name, clock in (("rank_ms", self.work), ("wait_ms", self.waiting)):
            sums[name] = _filled(device, (job.world_size(),), 0.0)
            sums[name][job.rank()] = clock.read()
        maxima = self._maxima
        flat_sums = torch.cat([part.flatten() for part in sums.values()])
        # The maximum of a NaN and a number is either, depending on who is asked first.
        flat_maxima = torch.cat([part.flatten() for part in maxima.values()])
        flat_maxima = flat_maxima.masked_fill(flat_maxima.isnan(), torch.inf)
        self.model.add_up(flat_sums)
        if self.model.meshes is not None:
            dist.all_reduce(flat_maxima, op=dist.ReduceOp.MAX)
        arrived = None
        if device.type == "cuda":  # so that values() need not wait for the steps after this one
            flat_sums, flat_maxima = _copied(flat_sums), _copied(flat_maxima)
            arrived = torch.Event(device)
            arrived.record()
        return Reading(
            flat_sums,
            flat_maxima,
            arrived,
            {name: part.numel() for name, part in sums.items()},
            {name: part.numel() for name, part in maxima.items()},
            experts,
            self._has_drift,
        )


def values(reading: Reading) -> dict[str, float | int | list[float] | None]:
    """A line of the record; waits for the reading's step. None where there is nothing to measure.

    ``rank_ms`` are the times of a fixed piece of work, ``late_ms`` how much later than the first
    rank each came to the step's first sum; on a GPU both may be those of the reading before.
    ``*_layers`` have an entry for each layer with experts, or with attention, in the order of the
    model. What was not finite is NaN or infinite. ``silent_experts`` counts over all layers. A
    router's drift is that of all its weights, those for the noise level included.
    """
    if reading.arrived is not None:
        reading.arrived.synchronize()
    sums = _by_name(reading.sums, reading.sum_sizes)
    maxima = _by_name(reading.maxima, reading.max_sizes)
    record: dict[str, float | int | list[float] | None] = {}
    for key in KINDS.values():
        weight = float(sums[f"weight_{key}"])
        record[f"grad_norm_{key}"] = math.sqrt(sums[f"grad_{key}"]) if weight else None
        update = math.sqrt(sums[f"update_{key}"] / weight) if weight else None
        record[f"update_ratio_{key}"] = update
    norm, rows = (sums[k].view(-1, reading.num_experts) for k in ("output_norm", "output_rows"))
    record["silent_experts"] = silent_experts(norm, rows) if rows.any() else None
    for name in ("bias_norm", "bias_step", "bias_saturation"):
        record[name] = _worst(maxima[name])
    has_router = sums["router_count"] > 0
    router_rms = (sums["router_square"] / sums["router_count"]).sqrt()[has_router]
    record["router_logit_rms"] = _worst(router_rms)
    drift = (sums["drift"] / sums["router_weight"]).sqrt()
    record["router_drift"] = _worst(drift) if reading.has_drift else None
    if "logit_max" in maxima:
        record["logit_max"] = _worst(maxima["logit_max"])
        mean = float(sums["logit_sum"] / sums["logit_count"]) if sums["logit_count"] else None
        record["logit_mean"] = mean
    attention = maxima["attention_logit"]
    record["attention_logit_max"] = _worst(attention)
    record["bias_norm_layers"] = maxima["bias_norm"].tolist()
    record["router_logit_rms_layers"] = router_rms.tolist()
    record["attention_logit_max_layers"] = attention[attention > -math.inf].tolist()
    return record | _compare_ranks(sums["rank_ms"].tolist(), sums["wait_ms"].tolist())


def _compare_ranks(
    rank_ms: list[float], wait_ms: list[float]
) -> dict[str, float | int | list[float] | None]:
    record: dict[str, float | int | list[float] | None] = {
        "straggler": None,
        "straggler_rank": None,
        "rank_ms": None,
        "late_ms": None,
    }
    if all(map(math.isfinite, rank_ms)):  # which a GPU's first reading is not
        record["rank_ms"] = rank_ms
        if len(rank_ms) > 1:
            slowest = max(rank_ms)
            # Of an even number the faster middle one: or one of two ranks could hardly look slow.
            record["straggler"] = slowest / statistics.median_low(rank_ms)
            record["straggler_rank"] = rank_ms.index(slowest)
    if len(wait_ms) > 1 and all(map(math.isfinite, wait_ms)):
        record["late_ms"] = [max(wait_ms) - wait for wait in wait_ms]
    return record


def silent_experts(norm_LE: Tensor, rows_LE: Tensor) -> int:
    """Experts whose mean output norm is next to nothing beside that of their layer's median.

    Args:
        norm_LE: sums of output norms.
        rows_LE: how many outputs these are; experts without any do not count.
    """
    mean_LE = norm_LE / rows_LE  # NaN without a row, which nanmedian leaves out
    median_L1 = mean_LE.nanmedian(dim=1, keepdim=True).values
    return int((mean_LE < SILENT_SHARE * median_L1).sum())


def _by_name(flat: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))


def _worst(layers: Tensor) -> float | None:
    """The largest of what was measured; NaN if one is."""
    layers = layers[layers != -math.inf]
    return float(layers.max()) if len(layers) else None


def _filled(device: torch.device, shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64, device=device)


def _copied(x: Tensor) -> Tensor:
    """In pinned memory of the host, at some later time."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _router_names(model: ParallelModel) -> list[list[str]]:
    """Names of each router's weights, in the order of ``model.moe_rows()``."""
    return [
        [
            f"backbone.layers.{name}.ffn.router.{part}"
            for part, _ in block.ffn.router.named_parameters()
        ]
        for stage in model.stages
        for name, block in stage.model.backbone.layers.items()
        if isinstance(block.ffn, MoE)
    ]
