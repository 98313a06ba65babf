"""The tables of what watches over a run: ``[stability]``, ``[rewind]`` and ``[log]``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from trinity.core.instruments import instruments
from trinity.core.tables import NonNegative, Positive, PositiveFloat, Table


class StabilityConfig(Table):
    """Which steps are not applied (:mod:`trinity.train.stability`).

    A step whose loss or gradient is not finite never is: it ends the run, unless steps are skipped
    or the run rewinds.
    """

    skip_spikes: bool = Field(
        default=False, description="skip steps with a spike of the loss, or without finite numbers"
    )
    loss_threshold: PositiveFloat = Field(
        default=6.0, description="robust standard deviations above the recent median: a spike"
    )
    min_steps: Positive = Field(default=64, le=64, description="steps seen before any is judged")
    max_skipped_in_a_row: Positive = Field(
        default=20, description="more than these end the run, unless it rewinds"
    )
    replay_every_steps: NonNegative = Field(
        default=0, description="do a step twice and compare, against silent corruption; 0: never"
    )
    replicas_every_steps: NonNegative = Field(
        default=0, description="compare what several ranks hold copies of; 0: never"
    )


class RewindConfig(Table):
    """Going back to an earlier state and around the data that did harm (trinity.train.rewind)."""

    enabled: bool = False
    snapshot_every_steps: Positive = Field(default=100, description="how often the state is copied")
    snapshot_dir: str | None = Field(
        default=None,
        description="disk of each machine that holds the copies; without it, host memory does",
    )
    num_snapshots: Positive = Field(default=3, description="copies that are kept")
    spikes: Positive = Field(default=5, description="more of them than this trigger a rewind ...")
    window_steps: Positive = Field(default=50, description="... among so many steps")
    margin_steps: NonNegative = Field(
        default=50, description="go back at least this far before the first of them"
    )
    pad_steps: NonNegative = Field(
        default=20, description="data skipped before the first spike and after the last, in steps"
    )
    max_attempts: Positive = Field(
        default=3, description="rewinds without progress before giving up"
    )
    fp8_fallback: tuple[str, ...] = Field(
        default=(), description='linears that a rewind takes out of FP8, such as "layers.3.*"'
    )


class LogConfig(Table):
    """What is written while training."""

    every_steps: Positive = 1
    load_every_steps: Positive = Field(
        default=1, description="how often a step's line holds the load of every single expert"
    )
    instruments_every_steps: NonNegative = Field(
        default=10, description="how often the dearer instruments are read; 0: never"
    )
    alarm_levels: dict[str, float] = Field(
        default={}, description="alarm levels by instrument, in place of those of the table"
    )
    tensorboard: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := sorted(self.alarm_levels.keys() - instruments().keys()):
            raise ValueError(
                f"alarm_levels names {unknown[0]!r}, which is no instrument; there are "
                f"{', '.join(instruments())}"
            )
        return self
