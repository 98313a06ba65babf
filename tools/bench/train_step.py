"""Training-step race against Hugging Face's ``AfmoeForCausalLM`` of the same size.

Same weights, same tokens, both with fused AdamW. Correctness first: fp32 loss and every gradient
must agree before anything is timed. Then the candidates take turns in one process, on one thread,
by process CPU time, which other work on the machine hardly disturbs; the minimum counts. Routers
are random and tokens change every step, since a frozen routing flatters every implementation.

    python tools/bench/train_step.py --sequence 1024 --json result.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AfmoeConfig, AfmoeForCausalLM

from trinity.ckpt.hf import hf_state_dict
from trinity.core.config import ModelConfig
from trinity.models.lm import LanguageModel

TOKENS_PER_STEP = {256: 256, 1024: 2048, 4096: 4096}
BALANCE_LOSS, Z_LOSS = 0.0, 0.0  # transformers has neither, so neither is raced


def shape() -> ModelConfig:
    """Hidden 256, 8 layers of which one dense, 32 experts top-4 of width 128, window 256."""
    return ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=8,
        num_dense_layers=1,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        route_scale=2.448,
        sliding_window=256,
        max_position_embeddings=8192,
    )


def hf_config(config: ModelConfig) -> AfmoeConfig:
    """The same shape for transformers."""
    shared = set(AfmoeConfig().to_dict()) & set(ModelConfig.model_fields)
    values = {name: getattr(config, name) for name in shared - {"layer_types"}}
    return AfmoeConfig(
        **values,
        layer_types=list(config.layer_types),
        use_cache=False,
    )


class Candidate:
    """One implementation in one setting: a step function and what it costs."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        *,
        bf16: bool,
    ) -> None:
        self.name = name
        self._module, self._loss_of, self._bf16 = module, loss_of, bf16
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        self.cpu_s: list[float] = []
        self.first_step_s = 0.0
        self.losses: list[float] = []

    def step(self, tokens_BS: torch.Tensor) -> float:
        """Forward, backward, optimizer; returns the process CPU seconds it took."""
        start_s = time.process_time()
        self._optimizer.zero_grad(set_to_none=True)
        context = (
            torch.autocast("cpu", dtype=torch.bfloat16) if self._bf16 else contextlib.nullcontext()
        )
        with context:
            loss = self._loss_of(tokens_BS)
        loss.backward()
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        return time.process_time() - start_s


def make_hf(weights: dict[str, torch.Tensor], config: ModelConfig, *, fast: bool) -> Candidate:
    """transformers as a user gets it, or at its best: bf16 autocast and ``torch.compile``."""
    model = AfmoeForCausalLM(hf_config(config))
    model.load_state_dict(weights)
    model.set_experts_implementation("grouped_mm")
    model.train()
    runner: Any = torch.compile(model) if fast else model

    def loss_of(tokens_BS: torch.Tensor) -> torch.Tensor:
        return runner(input_ids=tokens_BS, labels=tokens_BS).loss

    name = "transformers, bf16 autocast + compile" if fast else "transformers, default (fp32)"
    return Candidate(name, model, loss_of, bf16=fast)


def make_trinity(model: LanguageModel, *, bf16: bool, compiled: bool) -> Candidate:
    """Our model, through the same loss call that training uses."""
    if compiled:
        for layer in model.backbone.layers.values():
            layer.compile()

    def loss_of(tokens_BS: torch.Tensor) -> torch.Tensor:
        targets_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=-100)
        loss = model.loss(tokens_BS, targets_BS, z_loss=Z_LOSS)
        num_targets = int((targets_BS != -100).sum())
        return loss.total / num_targets + BALANCE_LOSS * loss.balance_loss

    name = "trinity, " + ("bf16" if bf16 else "fp32") + (" + compile" if compiled else "")
    return Candidate(name, model, loss_of, bf16=bf16)


def check_equal(ours: LanguageModel, config: ModelConfig, tokens_BS: torch.Tensor) -> float:
    """Gate: fp32 loss and every gradient equal transformers'; returns the worst relative error."""
    peer = AfmoeForCausalLM(hf_config(config))
    peer.load_state_dict(hf_state_dict(ours))
    peer_loss = peer(input_ids=tokens_BS, labels=tokens_BS).loss
    peer_loss.backward()
    targets_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=-100)
    loss = ours.loss(tokens_BS, targets_BS).total / int((targets_BS != -100).sum())
    loss.backward()
    worst = abs(float(loss.detach() - peer_loss.detach())) / float(peer_loss.detach())
    gradients = hf_state_dict(ours, gradients=True)
    for name, parameter in peer.named_parameters():
        if parameter.grad is None:
            continue
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        worst = max(worst, float(error))
    ours.zero_grad(set_to_none=True)
    if worst > 1e-4:
        raise SystemExit(f"not timed: gradients differ from transformers' by {worst:.1e}")
    return worst


def race(candidates: list[Candidate], make_tokens: Callable[[], torch.Tensor], rounds: int) -> None:
    """Warm every candidate up, then let them take turns."""
    for candidate in candidates:
        candidate.first_step_s = candidate.step(make_tokens())
        candidate.step(make_tokens())
    for _ in range(rounds):
        tokens_BS = make_tokens()
        for candidate in candidates:
            candidate.cpu_s.append(candidate.step(tokens_BS))


def main() -> None:
    """Run the race and print a table; with --json also write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, choices=sorted(TOKENS_PER_STEP), default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-compile-peer", action="store_true", help="skip the slow-to-start peer"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, rows = shape(), TOKENS_PER_STEP[arguments.sequence] // arguments.sequence
    generator = torch.Generator().manual_seed(0)

    def make_tokens() -> torch.Tensor:
        size = (rows, arguments.sequence)
        return torch.randint(0, config.vocab_size, size, generator=generator)

    start = LanguageModel.initialized(config, seed=0)
    worst = check_equal(start, config, make_tokens()[:, :512])
    weights = {name: tensor.clone() for name, tensor in hf_state_dict(start).items()}
    state = start.state_dict()

    def ours(**options: bool) -> Candidate:
        model = LanguageModel.initialized(config, seed=0)
        model.load_state_dict(state)
        return make_trinity(model, **options)

    candidates = [
        make_hf(weights, config, fast=False),
        ours(bf16=False, compiled=False),
        ours(bf16=True, compiled=False),
        ours(bf16=True, compiled=True),
    ]
    if not arguments.no_compile_peer:
        candidates.insert(1, make_hf(weights, config, fast=True))
    race(candidates, make_tokens, arguments.rounds)
    report(candidates, arguments, worst)


def report(candidates: list[Candidate], arguments: argparse.Namespace, worst: float) -> None:
    """Print the table; ratios are CPU seconds of a peer over ours."""
    table = Table(title=f"training step, sequence {arguments.sequence}, gate error {worst:.0e}")
    for heading in ("candidate", "CPU ms (min)", "first step s", "loss", "vs default", "vs best"):
        table.add_column(heading)
    peers = [min(c.cpu_s) for c in candidates if c.name.startswith("transformers")]
    rows = []
    for candidate in candidates:
        best_s = min(candidate.cpu_s)
        ratios = [peers[0] / best_s, min(peers) / best_s]
        rows.append(
            {
                "candidate": candidate.name,
                "cpu_ms": round(best_s * 1e3, 1),
                "first_step_s": round(candidate.first_step_s, 1),
                "loss": round(candidate.losses[-1], 4),
                "vs_default": round(ratios[0], 2),
                "vs_best": round(ratios[1], 2),
            }
        )
        table.add_row(*(str(value) for value in rows[-1].values()))
    Console(width=110).print(table)
    record = {
        "benchmark": "train_step",
        "sequence": arguments.sequence,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "gate_error": worst,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
