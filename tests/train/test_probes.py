"""Instruments of one process against the definitions, computed the slow way."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.probe_cases import make_config, make_trainer, microbatches_of, train
from tools.ledger import HYBRID
from trinity.core.instruments import instruments
from trinity.nn import attention, linear_mixer
from trinity.nn.feedforward import GroupedExperts
from trinity.nn.head import VocabularyHead
from trinity.nn.router import SigmoidRouter
from trinity.ops.attention import causal_attention, forgetting_attention
from trinity.optim.groups import parameter_table
from trinity.parallel import recompute
from trinity.train.probe_attention import stride_for
from trinity.train.probe_hooks import first_rows
from trinity.train.probe_work import typical
from trinity.train.probes import KINDS, Probes, silent_experts, values


def _kinds(trainer: Any) -> dict[str, str]:
    rows = parameter_table(trainer.model.named_parameters(), trainer.config.optim)
    return {row.name: KINDS[row.kind] for row in rows}


def test_gradients_and_updates_by_kind_of_parameter() -> None:
    trainer = make_trainer(make_config())
    probes, kinds = Probes(trainer.model, trainer.optimizers), _kinds(trainer)
    for step in range(2):
        microbatches, counts = microbatches_of(trainer, step)
        trainer.optimizers.zero_grad()
        with probes.measuring():
            trainer.model.pipeline.forward_backward(microbatches, counts)
        probes.before_update()
        parameters = dict(trainer.model.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            squares[f"grad {kinds[name]}"] += parameter.grad.square().sum()
        trainer.optimizers.step()
        for stage in trainer.model.stages:
            stage.take_losses()
        probes.after_update()
        record = values(probes.reading())
        for name, parameter in parameters.items():
            squares[f"move {kinds[name]}"] += (parameter.detach() - before[name]).square().sum()
            squares[f"weight {kinds[name]}"] += before[name].square().sum()
        for kind in KINDS.values():
            grad_norm = squares[f"grad {kind}"].sqrt().item()
            ratio = (squares[f"move {kind}"] / squares[f"weight {kind}"]).sqrt().item()
            assert grad_norm > 0
            assert ratio > 0
            assert record[f"grad_norm_{kind}"] == pytest.approx(grad_norm, rel=1e-10)
            assert record[f"update_ratio_{kind}"] == pytest.approx(ratio, rel=1e-10)


def test_a_skipped_step_has_no_update_and_no_move_of_the_bias() -> None:
    trainer = make_trainer(make_config())
    probes = Probes(trainer.model, trainer.optimizers)
    train(trainer, 0, probes)
    record = train(trainer, 1, probes, skip=True)
    assert record["router_drift"] == 0.0
    assert record["bias_step"] == 0.0
    assert [record[f"update_ratio_{kind}"] for kind in KINDS.values()] == [0.0] * 4
    assert record["bias_norm"]


def test_biases_and_router_drift() -> None:
    trainer = make_trainer(make_config())
    model = trainer.model.whole_model
    assert model is not None
    probes = Probes(trainer.model, trainer.optimizers)
    first = train(trainer, 0, probes)
    assert first["router_drift"] is None
    routers = [moe.router for moe in model.moe_layers()]
    with torch.no_grad():
        routers[1].expert_bias[:3] = torch.tensor([1.0, -1.5, 0.99])
    weights = [router.weight.detach().clone() for router in routers]
    biases = [router.expert_bias.clone() for router in routers]
    train(trainer, 1)  # a step between two readings
    mid = [router.expert_bias.clone() for router in routers]
    record = train(trainer, 2, probes)
    drifts = [
        float((r.weight.detach() - w).norm() / r.weight.detach().norm())
        for r, w in zip(routers, weights, strict=True)
    ]
    norms = [r.expert_bias.double().square().mean().sqrt().item() for r in routers]
    moves = [
        (r.expert_bias - b).double().square().mean().sqrt().item()
        for r, b in zip(routers, mid, strict=True)
    ]
    assert not torch.equal(biases[0], mid[0])
    assert record["router_drift"] == pytest.approx(max(drifts), rel=1e-10)
    assert record["bias_norm_layers"] == pytest.approx(norms, rel=1e-6)
    assert record["bias_norm"] == pytest.approx(norms[1], rel=1e-6)
    assert record["bias_step"] == pytest.approx(max(moves), rel=1e-4)
    saturated = [(r.expert_bias.abs() >= 1).double().mean().item() for r in routers]
    assert max(saturated) > 0
    assert record["bias_saturation"] == max(saturated)
    probes.forget()
    assert train(trainer, 3, probes)["router_drift"] is None


class _Seen:
    """What the model itself computes with, caught on the way."""

    def __init__(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.router: dict[str, list[Tensor]] = defaultdict(list)
        self.experts: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
        self.logits: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.hooks = []
        for name, module in trainer.model.stages[0].model.named_modules():
            if isinstance(module, SigmoidRouter):
                self.hooks.append(module.register_forward_pre_hook(self._on_router(name)))
            if isinstance(module, GroupedExperts):
                self.hooks.append(module.register_forward_pre_hook(self._on_experts(name)))
            if isinstance(module, VocabularyHead):
                self.hooks.append(module.register_forward_pre_hook(self._on_head))
        monkeypatch.setattr(attention, "causal_attention", self._on_attention)
        monkeypatch.setattr(linear_mixer, "forgetting_attention", self._on_forgetting)

    def _on_router(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            self.router[name].append(F.linear(args[0], module.weight).detach())

        return hook

    def _on_experts(self, name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            self.experts[name].append((*args, module.gate_up.detach(), module.down.detach()))

        return hook

    def _on_head(self, module: Any, args: Any) -> None:
        self.logits.append(F.linear(args[0][args[1] != -100], module.weight).detach())

    def _on_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self._note(q, k, options["window"], options["document_ids_BS"], None)
        return causal_attention(q, k, v, **options)

    def _on_forgetting(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **options: Any
    ) -> Tensor:
        self._note(q, k, None, options["document_ids_BS"], decay)
        return forgetting_attention(q, k, v, decay, **options)

    def _note(
        self, q: Tensor, k: Tensor, window: int | None, ids: Tensor, decay: Tensor | None
    ) -> None:
        """The largest logit of the first row, by definition."""
        q, k = q[0].detach(), k[0].detach().repeat_interleave(q.shape[1] // k.shape[1], 0)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        heads, num_tokens = logits.shape[:2]
        for query in range(num_tokens):
            for key in range(num_tokens):
                hidden = key > query or (window is not None and query - key >= window)
                if hidden or len(set(ids[0, key : query + 1].tolist())) > 1:
                    logits[:, query, key] = -torch.inf
                elif decay is not None:
                    lost = decay[0, :, key + 1 : query + 1].detach().sum(-1)
                    logits[:, query, key] += lost.repeat_interleave(heads // len(lost))
        self.attention.append(logits.max())

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    "overrides", [["batch.microbatch_rows=2"], HYBRID], ids=["afmoe", "hybrid"]
)
def test_what_hooks_measure_is_what_the_model_computes(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    # A narrow window: the largest product of all is seldom inside.
    small = ["batch.sequence_length=48", "model.sliding_window=4"]
    config = make_config([*overrides, *small])
    trainer = make_trainer(config)
    seen = _Seen(trainer, monkeypatch)
    record = train(trainer, 0, Probes(trainer.model, trainer.optimizers))
    rms = [torch.cat(parts).square().mean().sqrt().item() for parts in seen.router.values()]
    assert record["router_logit_rms_layers"] == pytest.approx(rms, rel=1e-9)
    assert record["router_logit_rms"] == pytest.approx(max(rms), rel=1e-9)
    logits = torch.cat(seen.logits)
    assert record["logit_max"] == pytest.approx(logits.max().item(), rel=1e-10)
    assert record["logit_mean"] == pytest.approx(logits.mean().item(), rel=1e-8)
    per_layer = record["attention_logit_max_layers"]
    assert isinstance(per_layer, list)
    num_microbatches = config.batch.rows_per_step // config.batch.microbatch_rows
    highest = torch.stack(seen.attention).view(num_microbatches, -1).amax(0).tolist()
    assert len(highest) == len(per_layer)
    assert per_layer == pytest.approx(highest, rel=1e-9)
    assert record["attention_logit_max"] == max(per_layer)
    assert record["silent_experts"] == 0
    seen.remove()


def test_outputs_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(["batch.microbatch_rows=2"]))
    model = trainer.model.whole_model
    assert model is not None
    with torch.no_grad():
        list(model.moe_layers())[1].experts.down[3] *= 1e-5
    seen = _Seen(trainer, monkeypatch)
    probes = Probes(trainer.model, trainer.optimizers)
    record = train(trainer, 0, probes, skip=True)
    assert record["silent_experts"] == 1
    for row, calls in enumerate(seen.experts.values()):
        for expert in range(trainer.config.model.num_experts):
            norms = []
            for x_TD, index_TK, _, gate_up, down in calls:
                x_RD = x_TD[torch.where(index_TK == expert)[0][:8]]
                gate, up = (x_RD @ gate_up[expert].flatten(0, 1).mT).chunk(2, -1)
                norms.append(((F.silu(gate) * up) @ down[expert].mT).norm(dim=-1))
            mine = torch.cat(norms)
            assert probes.forward.sums["output_rows"][row, expert] == len(mine)
            measured = probes.forward.sums["output_norm"][row, expert]
            assert measured.item() == pytest.approx(mine.sum().item(), rel=1e-9)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_recompute_changes_no_reading(mode: str, precision: str) -> None:
    readings, counts = [], []
    for each in ("none", mode):
        overrides = [*HYBRID, f"train.recompute={each}", "batch.microbatch_rows=2"]
        trainer = make_trainer(make_config(overrides, precision))
        probes = Probes(trainer.model, trainer.optimizers)
        readings.append(train(trainer, 0, probes))
        counts.append([probes.forward.sums[key] for key in ("router_count", "logit_count")])
        assert float(probes.forward.sums["output_rows"].max()) <= 8 * 2  # two microbatches
    plain, again = readings
    for one, other in zip(*counts, strict=True):
        assert torch.equal(one, other)
    assert plain.keys() == again.keys()
    none = {key for key, value in plain.items() if value is None}
    assert none == {key for key, value in again.items() if value is None}
    for key in plain.keys() - none - {"rank_ms"}:
        assert again[key] == pytest.approx(plain[key], rel=1e-9 if precision == "fp64" else 1e-2)


def test_selective_recompute_keeps_nothing_of_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, right = [], recompute._keep_products

    def remembering() -> Any:
        pair = right()
        made.append(pair[0])
        return pair

    monkeypatch.setattr(recompute, "_keep_products", remembering)
    counts = []
    for is_measured in (False, True):
        made.clear()
        overrides = [*HYBRID, "train.recompute=selective", "batch.rows_per_step=1"]
        trainer = make_trainer(make_config(overrides))
        train(trainer, 0, Probes(trainer.model, trainer.optimizers) if is_measured else None)
        counts.append([len(results) for keep in made for results in keep.kept.values()])
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def test_measuring_changes_no_bit_and_leaves_nothing_behind() -> None:
    overrides = [*HYBRID, "batch.rows_per_step=2"]
    trainers = [make_trainer(make_config(overrides, "bf16")) for _ in range(2)]
    probes = Probes(trainers[1].model, trainers[1].optimizers)
    state = torch.get_rng_state()
    for step in range(3):
        train(trainers[0], step)
        train(trainers[1], step, probes)
    assert torch.equal(torch.get_rng_state(), state)
    plain, measured = (trainer.model.state_dict() for trainer in trainers)
    for name, tensor in plain.items():
        assert torch.equal(measured[name], tensor), name
    for module in trainers[1].model.stages[0].modules():
        assert not module._forward_hooks, module
        assert not module._forward_pre_hooks, module
        assert getattr(module, "context", None) is None
        assert getattr(module, "attention_context", None) is None


def test_hooks_go_when_a_step_fails() -> None:
    trainer = make_trainer(make_config())
    probes = Probes(trainer.model, trainer.optimizers)
    with pytest.raises(RuntimeError, match="out of memory"), probes.measuring():
        raise RuntimeError("out of memory")
    modules = list(trainer.model.stages[0].modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any(getattr(m, "context", None) for m in modules)


def test_saturated_scores_and_numbers_that_are_not_finite() -> None:
    trainer = make_trainer(make_config(dtype="fp32"))
    model = trainer.model.whole_model
    assert model is not None
    assert model.lm_head is not None
    with torch.no_grad():
        for moe in model.moe_layers():
            moe.router.weight *= 1e6
    probes = Probes(trainer.model, trainer.optimizers)
    record = train(trainer, 0, probes)
    assert isinstance(record["router_logit_rms"], float)
    assert 15 < record["router_logit_rms"] < 90
    with torch.no_grad():
        model.lm_head.weight[5, 7] = torch.nan
    record = train(trainer, 1, probes, skip=True)
    assert record["logit_max"] == torch.inf
    assert str(record["logit_mean"]) == "nan"
    assert str(record["grad_norm_matrix"]) == "nan"


def test_a_dense_model_has_no_routers_to_read() -> None:
    config = make_config(["model.num_dense_layers=5"])
    trainer = make_trainer(config)
    probes = Probes(trainer.model, trainer.optimizers)
    for step in range(2):
        record = train(trainer, step, probes)
    missing = {key for key, value in record.items() if value is None}
    assert missing >= {"bias_norm", "router_logit_rms", "router_drift", "silent_experts"}
    assert missing >= {"grad_norm_router", "update_ratio_router"}
    assert record["bias_norm_layers"] == []
    assert record["grad_norm_matrix"]


def test_every_instrument_of_the_table_is_read() -> None:
    trainer = make_trainer(make_config())
    record = train(trainer, 0, Probes(trainer.model, trainer.optimizers))
    keys = {row.key for row in instruments().values() if row.record == "instruments"}
    assert keys <= record.keys()
    assert record["straggler"] is None
    assert record["straggler_rank"] is None
    rank_ms = record["rank_ms"]
    assert isinstance(rank_ms, list)
    assert rank_ms[0] > 0


def test_silent_experts() -> None:
    norm_LE = torch.tensor([[8.0, 4.0, 1e-3, 0.0], [8.0, 9e-3, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    rows_LE = torch.tensor([[8.0, 4.0, 2.0, 0.0], [8.0, 8.0, 8.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert silent_experts(norm_LE[:1], rows_LE[:1]) == 1  # 5e-4 of the median; one got nothing
    assert silent_experts(norm_LE[1:2], rows_LE[1:2]) == 1  # of four the lower middle one counts
    assert silent_experts(norm_LE, rows_LE) == 2


def test_first_rows() -> None:
    index_TK = torch.tensor([[2, 0], [2, 1], [0, 2], [2, 0]])
    rows, is_there = first_rows(index_TK, 4, 3)
    assert is_there.tolist() == [[True] * 3, [True, False, False], [True] * 3, [False] * 3]
    assert rows[0].tolist() == [0, 2, 3]
    assert rows[1, 0] == 1
    assert rows[2].tolist() == [0, 1, 2]


def test_samples_and_times() -> None:
    assert [stride_for(n, 64) for n in (1, 64, 65, 128, 1000)] == [1, 1, 2, 2, 16]
    assert typical([2.0, 1.0, 90.0, 3.0]) == 2.0


@pytest.mark.slow
def test_compiled_blocks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(["train.compile=true", "batch.rows_per_step=2"], "fp32"))
    probes = Probes(trainer.model, trainer.optimizers)
    train(trainer, 0)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    record = train(trainer, 1, probes)
    train(trainer, 2)
    missing = {key for key, value in record.items() if value is None}
    inside = {"attention_logit_max", "router_logit_rms", "silent_experts"}
    assert inside <= missing
    assert record["attention_logit_max_layers"] == record["router_logit_rms_layers"] == []
    plain = make_trainer(make_config(["batch.rows_per_step=2"], "fp32"))
    train(plain, 0)
    expected = train(plain, 1, Probes(plain.model, plain.optimizers))
    for key in ("grad_norm_matrix", "update_ratio_table", "bias_norm", "logit_max", "logit_mean"):
        assert record[key] == pytest.approx(expected[key], rel=1e-3), key
