"""Plans of diffusion transformers: counts against real builds, what blocks keep, the search."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import trinity.nn.conv
from tests.plan.plan_cases import (
    assert_counts_of_a_real_build,
    assert_pipeline_rank_as_planned,
    case_of,
    traffic_of,
)
from tests.plan.test_plan_activations import (
    _convolution_that_keeps_its_input,
    _use_kernels_of_gpus,
    _weight_shapes,
)
from tools.ledger import ROOT
from trinity.cli import app
from trinity.core.errors import ConfigError
from trinity.core.image_run_config import ImageRunConfig
from trinity.core.load_config import load_image_config
from trinity.core.runtime import autocast
from trinity.models.build import parameter_counts
from trinity.models.dit import DiffusionTransformer
from trinity.models.flops import train_flops_per_token
from trinity.nn.block import Block
from trinity.nn.modulation import NUM_MODULATIONS, Conditioning
from trinity.nn.rope import image_rope_tables
from trinity.ops.image_attention import Sight
from trinity.parallel.mesh import Layout, check_layout, layout_for
from trinity.plan.activations import saved_bytes
from trinity.plan.command import parallel_toml
from trinity.plan.compute import Machine, block_time
from trinity.plan.cost import step_cost
from trinity.plan.dry_run import dry_run
from trinity.plan.flops import model_flops_per_token
from trinity.plan.hardware import load_efficiency, load_gpu
from trinity.plan.memory import peak_memory, usable_bytes
from trinity.plan.search import search

ONE = ["model.patch_scales=[1]", "images.coarse_shares=[1.0]", "batch.sequence_length=64"]
"""One image a row."""
LARGE = ("dit_xl", "dit_moe")


def _small(*overrides: str) -> ImageRunConfig:
    return load_image_config(ROOT / "configs/ledger_dit.toml", ["train.precision=bf16", *overrides])


@pytest.mark.parametrize("name", ["ledger_dit", "dit_tiny", *LARGE])
def test_parameters_and_flops_are_those_of_the_model(name: str) -> None:
    config = load_image_config(ROOT / f"configs/{name}.toml")
    case = case_of(config, Layout())
    counts = parameter_counts(config.model)
    biases = config.model.num_experts * len(config.model.moe_layers)
    assert case.shape.num_parameters + biases == counts["total"]
    wanted = train_flops_per_token(config.model, config.tokens_of_image)
    assert model_flops_per_token(case) == pytest.approx(wanted, rel=1e-12)


LAYOUTS = {
    "fsdp x ep": (Layout(dp_shard=4, ep=2), ["parallel.ep=2", "train.recompute=selective"]),
    "hsdp, gathered once": (
        Layout(dp_replicate=2, dp_shard=4, ep=4),
        ["parallel.ep=4", "parallel.dp_replicate=2", "parallel.reshard_after_forward=false"],
    ),
    "tp": (Layout(tp=2, dp_shard=2), ["parallel.tp=2"]),
    "tp without sp": (
        Layout(tp=2, dp_shard=2),
        ["parallel.tp=2", "parallel.sequence_parallel=false"],
    ),
    "tp without sp, one image a row": (
        Layout(tp=2, dp_shard=2),
        ["parallel.tp=2", "parallel.sequence_parallel=false", *ONE],
    ),
    "experts cut in width": (Layout(dp_shard=16), []),
    "cp, recomputed": (Layout(cp=2, dp_shard=2), ["parallel.cp=2", "train.recompute=full"]),
    "cp, one image a row": (
        Layout(cp=2, dp_shard=2, ep=2),
        ["parallel.cp=2", "parallel.ep=2", *ONE],
    ),
}
SECONDS_EACH = (
    *("tp", "tp without sp", "experts cut in width"),
    *("cp, recomputed", "cp, one image a row"),
)
"""As many as that, for what the others show too."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SECONDS_EACH else n for n in LAYOUTS],
)
def test_counts_equal_those_of_a_real_build(name: str) -> None:
    layout, overrides = LAYOUTS[name]
    num_microbatches = 2 if "gathered once" in name else 1
    config = _small(f"batch.rows_per_step={num_microbatches * layout.dp}", *overrides)
    assert_counts_of_a_real_build(config, layout)


def test_muon_moves_what_a_plan_says_on_average() -> None:
    """The ends are AdamW's, and so is what each way of a scan has for itself."""
    config = _small("batch.rows_per_step=2", "model.layer_pattern=S-*E")
    layout = Layout(dp_shard=2)
    runs = [dry_run(config, layout, rank).traffic["all-to-all", "fsdp"] for rank in range(2)]
    planned = [t for t in traffic_of(case_of(config, layout)) if t.purpose == "muon"]
    (entry,) = [t for t in planned if t.axis == "fsdp"]
    assert entry.num_calls == runs[0].num_calls
    assert 2 * entry.num_bytes == pytest.approx(sum(run.num_bytes for run in runs), rel=1e-2)


@pytest.mark.parametrize("pp_rank", [0, 1])
def test_pipeline_ranks_hold_and_move_what_is_planned(pp_rank: int) -> None:
    layout = Layout(pp=2, dp_shard=2)
    config = _small("parallel.pp=2", "batch.rows_per_step=4")
    assert_pipeline_rank_as_planned(config, layout, pp_rank)
    moved = {(t.kind, t.axis): t for t in traffic_of(case_of(config, layout), pp_rank)}
    # 96 tokens, and nine vectors of each of up to six images, of 32 channels in bf16, there once
    # and its gradient back, in each of two microbatches.
    sent = moved["send", "pp"]
    assert (sent.num_calls, sent.num_bytes) == (2, 2 * (96 + 6 * 9) * 32 * 2)


def test_context_parallel_exchanges_by_hand() -> None:
    """Two ranks of 48 positions; attention fetches all keys and values, scans states both ways."""
    config = _small("parallel.cp=2", "batch.rows_per_step=2", "model.layer_pattern=W-S-*-")
    entries = {t.kind: t for t in traffic_of(case_of(config, Layout(cp=2, dp_shard=1)))}
    attention = 2 * 96 * (16 + 16) * 2  # layers, positions, keys and values of 2 heads x 8
    states = 2 * 2 * (4 * 8 * 8 + 4) * 4  # ways, ranks, 4 heads of 8 x 8 and their decays
    for kind in ("all-gather", "reduce-scatter"):
        moved = entries[kind]
        assert moved.purpose == "context"
        assert (moved.num_calls, moved.num_bytes) == (2 * 4, 2 * (attention + states) // 2)


def test_a_token_is_held_against_its_row_and_scans_go_both_ways() -> None:
    """Time: masks hide what is computed all the same. FLOPs: what is seen."""
    machine = Machine(load_gpu("h200"), load_efficiency())

    def attention_s(*overrides: str) -> list[float]:
        case = case_of(_small(*overrides), Layout())
        return [block_time(case, machine, kind).attention for kind in case.shape.kinds]

    windowed, scan, full = attention_s("model.layer_pattern=W-S-*-")
    assert windowed == full
    assert scan > 0
    longer = attention_s("model.layer_pattern=W-S-*-", "batch.sequence_length=192")
    assert longer[2] == pytest.approx(4 * full)
    assert longer[1] == pytest.approx(2 * scan)
    # 32 query and 32 output channels against 64 keys, or 25 of a square; 3 x 2 FLOPs each.
    seen = {
        kind: model_flops_per_token(case_of(_small(f"model.layer_pattern={kind}-"), Layout()))
        for kind in "*W"
    }
    assert seen["*"] - seen["W"] == 6 * 64 * (64 - 25)


BLOCKS = {
    "full attention": 7,
    "window, experts": 2,
    "full attention, experts": 4,
    "mamba2s": 8,
    "mamba2s, experts": 1,
    "2mamba, experts": 3,
    "mamba2": 5,
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["one image", "packed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_saved_bytes_are_those_of_a_real_block(
    name: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, of rows with one image and with two, with what kernels of GPUs keep."""
    monkeypatch.setattr(trinity.nn.conv, "causal_conv", _convolution_that_keeps_its_input)
    several = ["model.patch_scales=[1, 2]", "batch.sequence_length=128"]
    config = load_image_config(
        ROOT / "configs/dit_tiny.toml",
        [
            *(several if is_packed else ONE),
            *("model.layer_pattern=W-SEWE2E*EM-XE*-S-", "model.num_key_value_heads=4"),
            *("model.mamba2={head_dim=32, state_dim=32}", "train.precision=bf16"),
            # Sizes that are those of no weight, which are told by their shapes.
            *("batch.rows_per_step=3", "batch.microbatch_rows=3", "model.intermediate_size=320"),
        ],
    )
    model = DiffusionTransformer.initialized(config.model, seed=0)
    block = model.backbone.layers[str(BLOCKS[name])]
    assert isinstance(block, Block)
    _use_kernels_of_gpus(block)
    measured = _saved_by_autograd(block, config)
    case = case_of(config, Layout())
    kind = case.shape.kinds[case.shape.kind_of_layer[BLOCKS[name]]]
    # The squared scan of a CPU keeps a little more than that of a GPU.
    near = 0.1 if name.startswith("2mamba") else 0.03 if "mamba" in name else 0.012
    assert saved_bytes(case, kind, "none") == pytest.approx(measured, rel=near)


def _saved_by_autograd(block: Block, config: ImageRunConfig) -> int:
    """Without weights, and without what all blocks share."""
    rows, positions = config.batch.microbatch_rows, config.batch.sequence_length
    shape = (rows, positions if config.images_per_row > 1 else 1)
    width = config.model.hidden_size
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
    coordinates_BSA = grid.view(1, 64, 2).repeat(rows, positions // 64, 1)
    ids_BS = (torch.arange(positions) // 64).int().expand(rows, -1)
    documents_BS = ids_BS if config.images_per_row > 1 else None

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*shape, *sizes, dtype=torch.bfloat16).requires_grad_()

    conditioning = Conditioning(
        drawn(NUM_MODULATIONS, width),
        drawn(width),
        torch.zeros(shape, dtype=torch.int64),
        Sight(coordinates_BSA, documents_BS),
    )
    rope = image_rope_tables(coordinates_BSA, config.model.head_dim, 100.0)
    shared = (*conditioning[:2], *rope)
    x_BSD = torch.randn(rows, positions, width, dtype=torch.bfloat16).requires_grad_()
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast(torch.device("cpu"), "bf16"),
    ):
        block(x_BSD, rope, documents_BS, None, conditioning)
    for tensor in shared:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    shapes = {frozenset(shape) for shape in _weight_shapes(block.parameters())}
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor in saved.values()
        if frozenset(tensor.shape) not in shapes
    )


def test_masks_are_kept_where_not_all_see_all() -> None:
    def kept(*overrides: str) -> list[float]:
        case = case_of(_small("model.layer_pattern=W-*-", *overrides), Layout())
        return [saved_bytes(case, kind, "none") for kind in case.shape.kinds]

    windowed, full = kept(*ONE)
    # 64 tokens: a number for each key, and keys and values of 4 heads instead of 2; in bf16.
    assert windowed - full == 64 * (64 + 2 * 2 * 8) * 2
    windowed, full = kept()
    assert windowed == full


def test_an_average_of_the_weights_needs_memory() -> None:
    layout, efficiency = Layout(dp_shard=2), load_efficiency()
    with_average, without = (
        peak_memory(case_of(_small(f"ema.decay={decay}"), layout), efficiency)
        for decay in (0.9, 0.0)
    )
    assert without.average == 0
    assert with_average.average == with_average.weights
    assert with_average.lasting == without.lasting + with_average.weights


@pytest.mark.parametrize("name", LARGE)
def test_large_configurations_fit_eight_gpus(name: str) -> None:
    config = load_image_config(ROOT / f"configs/{name}.toml")
    layout = layout_for(config.parallel, 8)
    check_layout(config, layout)
    case, gpu = case_of(config, layout), load_gpu("h100")
    memory = peak_memory(case, load_efficiency())
    assert memory.total <= usable_bytes(gpu, load_efficiency())
    cost = step_cost(case, gpu)
    assert 0 < cost.bound_s <= cost.step_s
    assert min(memory) >= 0
    assert min(cost.parts.values()) >= 0
    assert 0.05 < cost.mfu < 0.6


def test_search_finds_a_layout_that_would_train() -> None:
    config = load_image_config(ROOT / "configs/dit_moe.toml")
    plan = search(config, 8, load_gpu("h100"))
    winner = plan.ranking[0]
    assert isinstance(winner.case.config, ImageRunConfig)
    assert winner.setting.loss_chunk_rows == 0
    check_layout(winner.case.config, winner.case.layout)
    own = step_cost(case_of(config, layout_for(config.parallel, 8)), load_gpu("h100"))
    assert own.step_s <= 1.05 * winner.cost.step_s  # what stands in the file is as good
    assert tomllib.loads(parallel_toml(winner)).keys() == {"parallel", "batch", "train"}


def test_command_prints_images_per_second(tmp_path: Path) -> None:
    config = str(ROOT / "configs/dit_xl.toml")
    arguments = ["plan", config, "--gpus", "8", "--gpu", "h100", "--top", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    for text in ("images of 256 at scale 1", "images/s/GPU", "fastest layouts", "[parallel]"):
        assert text in result.output
    assert "chunk_rows" not in result.output


def test_params_of_images() -> None:
    result = CliRunner().invoke(app, ["params", str(ROOT / "configs/dit_moe.toml")])
    assert result.exit_code == 0, result.output
    counts = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in result.output.splitlines()
    }
    assert 2.8e9 < counts["total"] < 3.3e9
    assert counts["active"] < 0.3 * counts["total"]
    assert counts["routed_experts"] < counts["total"]


def test_what_makes_no_sense_for_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 8 h100 works"):
        search(_small("batch.rows_per_step=3", "batch.microbatch_rows=1"), 8, load_gpu("h100"))
