"""The configuration of a run: frozen, fully checked models, one class per TOML table.

A configuration is data. It is read from TOML (:mod:`trinity.core.load_config`), validated here
once, and never changes afterwards. ``[model]`` has a module of its own
(:mod:`trinity.core.model_config`), and so have the tables of what watches over a run
(:mod:`trinity.core.stability_config`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import Field, model_validator

from trinity.core.model_config import BackboneConfig, ModelConfig
from trinity.core.model_config import LinearConfig as LinearConfig
from trinity.core.model_config import Mamba2Config as Mamba2Config
from trinity.core.stability_config import LogConfig as LogConfig
from trinity.core.stability_config import RewindConfig as RewindConfig
from trinity.core.stability_config import StabilityConfig as StabilityConfig
from trinity.core.tables import (
    Fraction,
    Momentum,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Table,
)


class BalanceConfig(Table):
    """How routed experts are kept evenly loaded (report, section 2.3)."""

    rule: Literal["smebu", "sign", "none"] = "smebu"
    step: NonNegativeFloat = Field(default=5e-4, description="lambda of SMEBU, gamma of sign")
    decay: Momentum = Field(default=0.5, description="SMEBU momentum beta")
    sharpness: PositiveFloat = Field(default=2.0, description="SMEBU tanh slope kappa")
    sequence_loss: NonNegativeFloat = Field(
        default=1e-4, description="weight alpha of the sequence-wise balance loss; 0 turns it off"
    )


class LossConfig(Table):
    """The language-modelling loss."""

    z_loss: NonNegativeFloat = Field(default=1e-6, description="weight of mean logsumexp squared")
    chunk_rows: Positive = Field(default=256, description="tokens per chunk of the vocabulary loss")


class MuonConfig(Table):
    """Muon for weight matrices (report, section 2.4)."""

    enabled: bool = Field(default=True, description="False gives every parameter to AdamW")
    lr: NonNegativeFloat = 1e-3
    momentum: Momentum = 0.95
    nesterov: bool = True
    weight_decay: NonNegativeFloat = 0.1
    coefficients: str = Field(default="trinity", description="Newton-Schulz coefficient set")
    num_iterations: Positive = 5
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"


class AdamWConfig(Table):
    """AdamW for embeddings, head, norms and whatever Muon does not take."""

    lr: NonNegativeFloat = 3e-4
    beta1: Momentum = 0.9
    beta2: Momentum = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(default=0.1, description="on matrices; norms get none")


class OptimConfig(Table):
    """Both optimizers and what they share."""

    router: Literal["muon", "adamw"] = "muon"
    grad_clip: NonNegativeFloat = Field(
        default=1.0, description="global gradient norm limit; 0: off"
    )
    clip_rule: Literal["fixed", "zclip"] = Field(
        default="fixed",
        description='"zclip" also clips norms that stand out from the recent ones (2504.02507)',
    )
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()


class ScheduleConfig(Table):
    """Learning-rate factor over the run: linear warm-up, then the shape."""

    shape: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = Field(default=0, description="length of the final decay of wsd")
    final_fraction: Fraction = Field(default=0.0, description="factor at the last step")
    decay_shape: Literal["linear", "cosine"] = "linear"


class RampPoint(Table):
    """From this step on, a step holds this many rows."""

    from_step: Positive
    rows_per_step: Positive


class BatchConfig(Table):
    """How much data one optimizer step sees."""

    sequence_length: Positive = Field(description="tokens per row")
    rows_per_step: Positive = Field(description="rows of the global batch")
    microbatch_rows: Positive = Field(description="rows per forward pass and process")
    ramp: tuple[RampPoint, ...] = Field(default=(), description="batch-size ramp, ascending steps")

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = [point.from_step for point in self.ramp]
        if steps != sorted(set(steps)):
            raise ValueError(f"ramp has from_step values {steps}; they must ascend")
        for rows in (self.rows_per_step, *(point.rows_per_step for point in self.ramp)):
            if rows % self.microbatch_rows:
                raise ValueError(
                    f"rows_per_step={rows} is not a multiple of "
                    f"microbatch_rows={self.microbatch_rows}"
                )
        return self


class TokenizerConfig(Table):
    """Either an existing tokenizer, or the size of one to train on the sources."""

    path: str | None = Field(default=None, description="tokenizer.json or a directory holding one")
    vocab_size: Positive | None = Field(default=None, description="train a byte-level BPE this big")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of tokenizer.path and tokenizer.vocab_size")
        return self


class SourceConfig(Table):
    """One weighted source of documents."""

    name: str = Field(min_length=1)
    path: str = Field(description='file, directory or glob; "stdlib" = this Python\'s own sources')
    format: Literal["auto", "text", "jsonl", "parquet", "megatron"] = "auto"
    text_key: str = Field(default="text", description="column that holds the text")
    weight: PositiveFloat = Field(default=1.0, description="share of the tokens, relative")


class DataConfig(Table):
    """Documents, tokenizer, mixture and packing."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: TokenizerConfig
    cache_dir: str = "runs/data-cache"
    packing: Literal["rsdb", "sequential"] = "rsdb"
    buffer_documents: Positive = Field(
        default=256, description="documents open at once in the random sequential document buffer"
    )
    lanes: Positive = Field(default=8, description="independent row streams; a constant of the run")
    mask_documents: bool = Field(default=True, description="attention stays inside a document")
    skip_rows: tuple[tuple[NonNegative, Positive], ...] = Field(
        default=(), description="rows of the stream never trained on: [first, end) pairs, ascending"
    )
    exclude_documents: str | None = Field(
        default=None, description='file of documents never opened: lines of "source number"'
    )
    held_out_fraction: Fraction = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names {names} must differ from one another")
        if self.packing == "rsdb" and self.buffer_documents < self.lanes:
            raise ValueError(
                f"buffer_documents={self.buffer_documents} is below lanes={self.lanes}; every lane "
                "needs at least one document"
            )
        bounds = [bound for window in self.skip_rows for bound in window]
        if bounds != sorted(set(bounds)):
            raise ValueError(
                f"skip_rows={[list(window) for window in self.skip_rows]} must be [first, end) "
                "pairs that ascend and do not touch"
            )
        return self


class TrainConfig(Table):
    """The loop itself."""

    num_steps: Positive
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        default="bf16",
        description="compute type; parameters and optimizer state are fp32. fp64 is for proofs",
    )
    fp8: Literal["off", "tensorwise", "rowwise"] = Field(
        default="off", description="products of the blocks' linears in FP8, scaled per this"
    )
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = Field(default=False, description="torch.compile the blocks")
    device: str = Field(default="auto", description='"auto", "cpu", "cuda"')
    num_threads: NonNegative = Field(default=0, description="CPU threads; 0 leaves torch's choice")
    validate_every_steps: NonNegative = Field(default=100, description="0 turns validation off")
    validation_rows: Positive = 16
    profile_steps: NonNegative = Field(default=0, description="steps to trace from step 3 on")
    hang_s: NonNegativeFloat = Field(
        default=180.0, description="a step that takes longer ends the process, seconds; 0: never"
    )
    sample_prompt: str = Field(default="", description="text to continue when the run ends")


class ParallelConfig(Table):
    """How the ranks of a job share the work.

    The axes multiply to the world size: pp * dp_replicate * dp_shard * cp * tp. Expert parallelism
    has no ranks of its own: it borrows them from dp_shard * cp * tp.
    """

    dp_replicate: Positive = Field(default=1, description="copies of the sharded model (HSDP)")
    dp_shard: NonNegative = Field(
        default=0, description="ranks that share one copy (FSDP2); 0 takes all that are left"
    )
    cp: Positive = Field(default=1, description="ranks that share a row (context parallel)")
    tp: Positive = Field(default=1, description="ranks that share a matrix (tensor parallel)")
    sequence_parallel: bool = Field(
        default=True, description="with tp: split the tokens between the matrices, too"
    )
    ep: Positive = Field(default=1, description="ranks that share a layer's experts")
    dispatcher: Literal["all_to_all", "deep_ep"] = Field(
        default="all_to_all", description="how tokens travel to their experts"
    )
    pp: Positive = Field(default=1, description="ranks that share the layers (pipeline)")
    pp_schedule: Literal["1f1b", "interleaved_1f1b", "zbv", "dualpipev"] = "1f1b"
    pp_stages_per_rank: Positive = Field(
        default=1, description="stages of one rank; 2 or more for all schedules but 1f1b"
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="drop gathered parameters after each use; False gathers them, and reduces "
        "gradients, once per step: fastest where memory allows it",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="type in which gradients are summed over ranks"
    )
    timeout_s: Positive = Field(
        default=600, description="a collective that takes longer ends the job, seconds"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        two_stages = self.pp_schedule in ("zbv", "dualpipev")
        if self.pp_schedule == "1f1b" and self.pp_stages_per_rank != 1:
            raise ValueError(
                f"pp_stages_per_rank={self.pp_stages_per_rank} needs "
                'pp_schedule="interleaved_1f1b"; "1f1b" has one stage per rank'
            )
        if self.pp_schedule == "interleaved_1f1b" and self.pp_stages_per_rank < 2:
            raise ValueError('pp_schedule="interleaved_1f1b" needs pp_stages_per_rank >= 2')
        if two_stages and self.pp_stages_per_rank != 2:
            raise ValueError(
                f'pp_schedule="{self.pp_schedule}" has two stages on every rank; set '
                "pp_stages_per_rank=2"
            )
        if two_stages and self.pp > 1 and self.reshard_after_forward:
            raise ValueError(
                f'pp_schedule="{self.pp_schedule}" splits the backward, which gives silently wrong '
                "gradients when parameters are resharded after the forward; set "
                "reshard_after_forward=false"
            )
        return self


class CheckpointConfig(Table):
    """When to save and how many to keep."""

    every_steps: NonNegative = Field(default=100, description="0 saves at the end only")
    keep_last: Positive = 2
    keep_every_steps: NonNegative = Field(
        default=0, description="checkpoints of multiples of this are never deleted; 0: none"
    )
    asynchronous: bool = Field(
        default=True, description="write while training goes on; a save holds it up for a copy only"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every_steps and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps={self.keep_every_steps} is not a multiple of "
                f"every_steps={self.every_steps}; only common multiples would ever be saved"
            )
        return self


class EmaConfig(Table):
    """An exponential moving average of the weights, kept beside them for sampling."""

    decay: Momentum = Field(default=0.0, description="per step, in the long run; 0: no average")
    warmup: bool = Field(
        default=True, description="decay (1 + step) / (10 + step) while that is less"
    )


class RunConfig(Table):
    """What every run has, whatever it trains."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    seed: NonNegative = 0
    output_dir: str = "runs"
    model: BackboneConfig
    batch: BatchConfig
    train: TrainConfig
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    stability: StabilityConfig = StabilityConfig()
    rewind: RewindConfig = RewindConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.train.num_steps:
            raise ValueError(
                f"schedule.warmup_steps + decay_steps = "
                f"{self.schedule.warmup_steps + self.schedule.decay_steps} exceed "
                f"train.num_steps={self.train.num_steps}; shorten them"
            )
        return self

    @property
    def masks_documents(self) -> bool:
        """Whether tokens of a row are kept from seeing other documents, or images."""
        return True

    def sha256(self) -> str:
        """Hash of the effective configuration, independent of key order and file layout."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class Config(RunConfig):
    """A run that trains a language model."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        wanted = self.data.tokenizer.vocab_size
        if wanted is not None and wanted > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size={wanted} exceeds model.vocab_size="
                f"{self.model.vocab_size}; raise the latter or lower the former"
            )
        return self

    @property
    def masks_documents(self) -> bool:
        """As ``data.mask_documents`` says."""
        return self.data.mask_documents
