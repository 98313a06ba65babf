"""Published training runs as cases of the cost model; the facts stand in published.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trinity.core.config import Config, ModelConfig
from trinity.core.load_config import load_config, validate_config
from trinity.parallel.mesh import Layout
from trinity.plan.case import Case
from trinity.plan.cost import Cost, Stack, step_cost
from trinity.plan.hardware import load_gpu
from trinity.plan.mixers import MixerShape
from trinity.plan.shapes import OtherMixer, model_shape

TABLE = Path(__file__).with_name("published.toml")
WHOLE = 1 << 20
"""Rows of a loss chunk so large that there is only one: others fuse their loss."""
NO_EXPERTS = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
MIXER_WIDTHS = ("query", "key", "value", "output")


class PublishedRun(NamedTuple):
    """What somebody measured, and what the model says of it."""

    name: str
    gpu: str
    num_gpus: int
    tokens_per_s: float
    """Published, per GPU."""
    assumed: str
    source: str
    cost: Cost

    @property
    def error(self) -> float:
        """Predicted over published, minus 1."""
        return self.cost.tokens_per_s / self.tokens_per_s - 1

    @property
    def share_of_bound(self) -> float:
        """Published over what full overlap would give; above 1 the bound is wrong."""
        return self.tokens_per_s / self.cost.bound_tokens_per_s


def published_runs(root: Path) -> list[PublishedRun]:
    """All runs with their predictions; ``root`` is where configs/ lies."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [_run(entry, table["model"], root) for entry in table["run"]]


def _run(entry: Mapping[str, Any], models: Mapping[str, Any], root: Path) -> PublishedRun:
    stack = Stack(
        entry.get("gemm", "bf16"),
        entry.get("hides_dispatch", False),
        entry.get("hides_tensor", False),
        entry.get("one_copy_per_node", False),
        entry.get("max_nodes", 0),
    )
    cost = step_cost(_case(entry, models, root), load_gpu(entry["gpu"]), stack=stack)
    return PublishedRun(
        entry["name"],
        entry["gpu"],
        entry["num_gpus"],
        entry["tokens_per_s"],
        entry["assumed"],
        entry["source"],
        cost,
    )


def _case(entry: Mapping[str, Any], models: Mapping[str, Any], root: Path) -> Case:
    axes = dict(entry["layout"])
    others = Layout(**axes)
    layout = Layout(**axes, dp_shard=entry["num_gpus"] // others.world_size)
    mixer = None
    if "config" in entry:
        base = load_config(root / entry["config"], ["batch.ramp=[]"])
        model = base.model
    else:
        values = dict(models[entry["model"]])
        model, mixer = _model(values, entry["sequence_length"])
        base = _config(model, entry)
    parallel = base.parallel.model_copy(
        update={
            "pp_schedule": entry.get("schedule", "1f1b"),
            "pp_stages_per_rank": _stages_per_rank(entry),
            "reshard_after_forward": entry.get("reshard_after_forward", False),
        }
    )
    batch = base.batch.model_copy(
        update={key: entry[key] for key in ("rows_per_step", "microbatch_rows")}
    )
    train = base.train.model_copy(update={"recompute": entry["recompute"]})
    config = base.model_copy(update={"parallel": parallel, "batch": batch, "train": train})
    return Case(config, model_shape(model, config.optim, mixer), layout)


def _stages_per_rank(entry: Mapping[str, Any]) -> int:
    default = 2 if entry.get("schedule") == "dualpipev" else 1
    return int(entry.get("stages_per_rank", default))


def _config(model: ModelConfig, entry: Mapping[str, Any]) -> Config:
    """A run of another program: AdamW for everything, compiled or fused kernels."""
    values = {
        "name": "published",
        "model": model.model_dump(),
        "batch": {
            "sequence_length": entry["sequence_length"],
            "rows_per_step": entry["rows_per_step"],
            "microbatch_rows": entry["microbatch_rows"],
        },
        "data": {"sources": [{"name": "none", "path": ""}], "tokenizer": {"path": ""}},
        "train": {"num_steps": 1, "compile": True},
        "loss": {"chunk_rows": WHOLE},
        "optim": {"muon": {"enabled": False}},
    }
    config = validate_config(values, origin=str(TABLE))
    assert isinstance(config, Config)
    return config


def _model(values: dict[str, Any], sequence_length: int) -> tuple[ModelConfig, OtherMixer]:
    mixer = values.pop("mixer")
    values = {"route_scale": 1.0, "global_attn_every_n_layers": 1, **NO_EXPERTS, **values}
    model = ModelConfig.model_validate({"sliding_window": sequence_length, **values})
    heads = model.num_attention_heads
    if mixer == "gqa":
        query, key = heads * model.head_dim, model.num_key_value_heads * model.head_dim
        width = model.hidden_size
        matrices = {
            "q_proj": (query, width),
            "k_proj": (key, width),
            "v_proj": (key, width),
            "o_proj": (width, query),
        }
        return model, OtherMixer(matrices, MixerShape(query, key, key, query, heads, False))
    matrices = {name: tuple(shape) for name, shape in mixer.items() if name not in MIXER_WIDTHS}
    attention = MixerShape(
        mixer["query"], mixer["key"], mixer["value"], mixer["output"], heads, is_gated=False
    )
    return model, OtherMixer(matrices, attention)
