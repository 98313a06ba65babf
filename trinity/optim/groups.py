"""Which optimizer moves which parameter: one table, checked to cover everything exactly once."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from trinity.core.config import OptimConfig
from trinity.core.errors import ConfigError
from trinity.core.sharding import local_tensor
from trinity.optim.exchange import GroupOfAxes
from trinity.optim.muon import Muon, lr_scale

MATRIX = "matrix"
ROUTER = "router"
TABLE_LIKE = "embedding or head"
VECTOR = "vector"

# First match wins. Convolutions and rates (a row per head) have two dims but are no matrices.
KINDS: tuple[tuple[str, str], ...] = (
    ("*norm.weight", VECTOR),
    ("embed_tokens.weight", TABLE_LIKE),
    ("patch_embed.*", TABLE_LIKE),
    ("patch_head.*", TABLE_LIKE),
    ("condition.*", TABLE_LIKE),
    ("*.adaln.modulation", VECTOR),
    ("*.router.time_weight", VECTOR),
    ("*.mixer.reverse.*", VECTOR),
    ("lm_head.weight", TABLE_LIKE),
    ("*_conv.*", VECTOR),
    ("*.mixer.rates.*", VECTOR),
    ("*.mixer.skip.weight", VECTOR),
    ("*.ffn.router.weight", ROUTER),
    ("*.mixer.*_proj.weight", MATRIX),
    ("*.ffn.*_proj.weight", MATRIX),
    ("*.ffn.experts.gate_up", MATRIX),
    ("*.ffn.experts.down", MATRIX),
)
DECAYED_KINDS = frozenset({MATRIX, ROUTER})
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class ParameterRow(NamedTuple):
    """One line of the parameter table."""

    name: str
    shape: tuple[int, ...]
    num_parameters: int
    kind: str
    optimizer: str
    """"muon" or "adamw"."""
    lr: float
    """Peak learning rate before ``lr_scale``."""
    lr_scale: float
    weight_decay: float


def parameter_table(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig
) -> list[ParameterRow]:
    """Assign every parameter to exactly one optimizer.

    Muon takes weight matrices, and the router's if ``optim.router`` says so; AdamW takes
    embeddings, head, norms and other vectors. Matrices decay, the rest does not. Raises
    ConfigError naming a parameter that no rule knows.
    """
    return [_row(name, parameter, config) for name, parameter in named_parameters]


def _row(name: str, parameter: Tensor, config: OptimConfig) -> ParameterRow:
    kind = next((kind for pattern, kind in KINDS if fnmatch.fnmatchcase(name, pattern)), None)
    if kind is None or (kind in DECAYED_KINDS and parameter.ndim < 2):
        raise ConfigError(
            f"parameter {name} of shape {tuple(parameter.shape)} matches no rule of the optimizer "
            "table; add one to trinity/optim/groups.py"
        )
    takes_muon = kind == MATRIX or (kind == ROUTER and config.router == "muon")
    if takes_muon and config.muon.enabled:
        rows, columns = parameter.shape[-2:]
        optimizer, lr, decay = "muon", config.muon.lr, config.muon.weight_decay
        scale = lr_scale(rows, columns)
    else:
        optimizer, lr, scale = "adamw", config.adamw.lr, 1.0
        decay = config.adamw.weight_decay if kind in DECAYED_KINDS else 0.0
    shape = tuple(parameter.shape)
    return ParameterRow(name, shape, parameter.numel(), kind, optimizer, lr, scale, decay)


def render_table(rows: list[ParameterRow]) -> Table:
    """The table for people: layers and experts of equal treatment share a line."""
    groups: dict[tuple[str, ...], list[ParameterRow]] = {}
    for row in rows:
        parts = row.name.removeprefix("backbone.").split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        shape = "x".join(str(size) for size in row.shape)
        groups.setdefault((pattern, shape, row.optimizer), []).append(row)
    table = Table(title="parameters")
    for heading in ("name", "shape", "tensors", "parameters", "optimizer", "peak lr", "decay"):
        justify = "left" if heading == "name" else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for (pattern, shape, optimizer), members in groups.items():
        table.add_row(
            pattern,
            shape,
            str(len(members)),
            f"{sum(row.num_parameters for row in members):,}",
            optimizer,
            f"{members[0].lr * members[0].lr_scale:.2e}",
            f"{members[0].weight_decay:g}",
        )
    return table


class OptimizerSet:
    """Muon and AdamW behind one interface, with state addressed by parameter name.

    Parameters may be DTensors. AdamW then works on their local parts, since it treats every element
    alike; the state it reports is sharded like the parameters.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        rows: list[ParameterRow],
        config: OptimConfig,
        group_of_axes: GroupOfAxes | None = None,
    ) -> None:
        self.rows = rows
        """The parameter table."""
        self.parameters = dict(named_parameters)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._in_adamw: dict[str, Tensor] = {}
        """Name to what AdamW knows the parameter as."""
        muon = [self.parameters[row.name] for row in rows if row.optimizer == "muon"]
        if muon:
            self.optimizers["muon"] = Muon(
                muon,
                lr=config.muon.lr,
                momentum=config.muon.momentum,
                nesterov=config.muon.nesterov,
                weight_decay=config.muon.weight_decay,
                coefficients=config.muon.coefficients,
                num_iterations=config.muon.num_iterations,
                dtype=DTYPES[config.muon.dtype],
                group_of_axes=group_of_axes,
            )
        adamw = [row for row in rows if row.optimizer == "adamw"]
        if adamw:
            self._in_adamw = {row.name: local_tensor(self.parameters[row.name]) for row in adamw}
            self.optimizers["adamw"] = torch.optim.AdamW(
                [
                    {
                        "params": [
                            self._in_adamw[row.name] for row in adamw if row.weight_decay == decay
                        ],
                        "weight_decay": decay,
                    }
                    for decay in sorted({row.weight_decay for row in adamw})
                ],
                lr=config.adamw.lr,
                betas=(config.adamw.beta1, config.adamw.beta2),
                eps=config.adamw.eps,
                fused=True,
            )
        self._peak_lrs = {
            name: optimizer.defaults["lr"] for name, optimizer in self.optimizers.items()
        }

    def set_lr(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._peak_lrs[name] * factor

    def learning_rates(self) -> dict[str, float]:
        """Current rates as ``lr_muon`` and ``lr_adamw``."""
        return {
            f"lr_{name}": float(optimizer.param_groups[0]["lr"])
            for name, optimizer in self.optimizers.items()
        }

    def step(self, accept: Tensor | None = None) -> None:
        """Move every parameter, unless ``accept``, a boolean scalar, is false.

        Then neither parameters nor optimizer state change, whatever the gradients hold. On a GPU
        nothing waits to find out.
        """
        if accept is not None and accept.is_cpu:
            if not accept:
                return
            accept = None
        for name, part in self._in_adamw.items():
            gradient = self.parameters[name].grad
            part.grad = None if gradient is None else local_tensor(gradient)
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, Muon):
                optimizer.step(accept=accept)
            else:
                step_adamw(optimizer, accept)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters.values(), *self._in_adamw.values()):
            tensor.grad = None

    def state_bytes(self) -> int:
        """Memory of the state on this rank."""
        return sum(local_tensor(tensor).nbytes for tensor in self.state_dict().values())

    def exchanged_bytes(self) -> int:
        """Bytes that Muon has sent to other ranks since the last call."""
        muon = self.optimizers.get("muon")
        return muon.exchanged_bytes() if isinstance(muon, Muon) else 0

    def init_state(self) -> None:
        """Create all state tensors as they are before the first step, ready to be loaded into."""
        muon, adamw = self.optimizers.get("muon"), self.optimizers.get("adamw")
        if isinstance(muon, Muon):
            muon.init_state()
        for part in self._in_adamw.values():
            assert adamw is not None
            if not adamw.state[part]:
                adamw.state[part] = {
                    "step": torch.zeros((), dtype=torch.float32, device=part.device),
                    "exp_avg": torch.zeros_like(part),
                    "exp_avg_sq": torch.zeros_like(part),
                }

    def state_dict(self) -> dict[str, Tensor]:
        """All state as ``<parameter name>.<state name>`` -> tensor; nothing but tensors."""
        self.init_state()
        tensors: dict[str, Tensor] = {}
        for row in self.rows:
            parameter = self.parameters[row.name]
            known_as = self._in_adamw.get(row.name, parameter)
            for key, value in self.optimizers[row.optimizer].state[known_as].items():
                tensors[f"{row.name}.{key}"] = _sharded_like(parameter, value)
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy state back in place. Raises ConfigError when the names differ."""
        own = self.state_dict()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ConfigError(
                f"optimizer state does not fit: {odd[0]} and {len(odd) - 1} more exist on one side "
                "only; was the run started with another [optim] table?"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                local_tensor(tensor).copy_(local_tensor(tensors[name]))


def step_adamw(optimizer: torch.optim.Optimizer, accept: Tensor | None) -> None:
    """One step of a fused AdamW, which obeys a flag on the device that it calls ``found_inf``."""
    if accept is None:
        optimizer.step()
        return
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~accept).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _sharded_like(parameter: Tensor, state: Tensor) -> Tensor:
    """The same memory, as a DTensor where the parameter is one. Counters stay plain."""
    if isinstance(state, DTensor) or not isinstance(parameter, DTensor) or state.ndim == 0:
        return state
    return DTensor.from_local(
        state,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def build_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimConfig,
    group_of_axes: GroupOfAxes | None = None,
) -> OptimizerSet:
    """The optimizers of a model, every parameter in exactly one of them."""
    named = dict(named_parameters)
    return OptimizerSet(named, parameter_table(named.items(), config), config, group_of_axes)
