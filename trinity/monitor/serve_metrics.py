"""The metrics of ``/metrics``: names, labels, help texts, filled from what a watcher knows.

Every label has a bounded set of values, and no series is per expert: a run has about 115 series,
one for each source and three for each expert layer, however long it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trinity.core.errors import ConfigError
from trinity.core.instruments import Instrument, instruments

if TYPE_CHECKING:
    from prometheus_client import Metric

STATES = ("starting", "running", "silent", "stopped", "failed", "finished")
KNOWN_EVENTS = (
    "started",
    "resumed",
    "stopped",
    "finished",
    "alarm",
    "skip",
    "clip",
    "rewind",
    "gave_up",
    "checkpoint_rejected",
    "checkpoint_failed",
    "sink_failed",
    "fp8_fallback",
    "replay_mismatch",
    "replica_mismatch",
    "hang",
)
OTHER = "other"
"""The label of an event or alarm that this version does not know."""
SEVERITIES = ("page", "warn")
MAX_LAYERS = 256
MAX_SOURCES = 32

RECORD_GAUGES = {
    # name: (kind of record, key, help)
    "trinity_step_seconds": ("train", "step_s", "Duration of the last step, seconds."),
    "trinity_learning_rate_muon": ("train", "lr_muon", "Learning rate of Muon."),
    "trinity_learning_rate_adamw": ("train", "lr_adamw", "Learning rate of AdamW."),
    "trinity_clip_factor": ("train", "clip_factor", "What the last gradient was multiplied by."),
    "trinity_peak_memory_bytes": ("train", "peak_memory_bytes", "Peak memory of rank 0, bytes."),
    "trinity_checkpoint_step": ("checkpoint", "step", "Step of the newest checkpoint."),
    "trinity_checkpoint_bytes": ("checkpoint", "num_bytes", "Size of that checkpoint, bytes."),
    "trinity_checkpoint_written_seconds": (
        "checkpoint",
        "written_s",
        "Time to write that checkpoint, seconds.",
    ),
}
"""Numbers that are exported beside the table of instruments."""


@dataclass
class RunFacts:
    """What is exported of one run."""

    name: str
    state: str
    last_step: int | None = None
    last_progress: float | None = None
    """Unix seconds of the last step seen; None before the first."""
    tokens_total: float | None = None
    latest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The newest record of each kind."""
    load_shares: list[tuple[float, float, float]] = field(default_factory=list)
    """Per expert layer, of :func:`load_share`."""
    events: Mapping[str, int] = field(default_factory=dict)
    alarms: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By (instrument, severity)."""
    num_bad_lines: int = 0


@dataclass
class WatchFacts:
    """What is exported of the watcher itself."""

    polled_at: float
    """Unix seconds."""
    num_left_out: int = 0
    num_errors: int = 0
    pending: int = 0
    sent: int = 0
    failed: int = 0
    dropped: int = 0


def load_share(load_E: list[float]) -> tuple[float, float, float]:
    """Least and most tokens of an expert, in fair shares, and the load's entropy as a share of the
    most possible. A layer without a token: 0, 0, 0."""
    total, num_experts = sum(load_E), len(load_E)
    if total <= 0:
        return 0.0, 0.0, 0.0
    entropy = -sum(x / total * math.log(x / total) for x in load_E if x > 0)
    most = math.log(num_experts) if num_experts > 1 else 1.0
    return min(load_E) * num_experts / total, max(load_E) * num_experts / total, entropy / most


def gauge_name(row: Instrument) -> str:
    """Under which an instrument is exported."""
    return f"trinity_{row.name}"


def exported_instruments() -> list[Instrument]:
    """The instruments that are read off a record; the clock's are metrics of their own."""
    return [row for row in instruments().values() if row.record != "clock"]


def number(value: Any) -> float | None:
    """A record's value as a number, NaN and infinity included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def families(runs: Iterable[RunFacts], watch: WatchFacts) -> list[Metric]:
    """Everything that one scrape returns."""
    runs = list(runs)
    return [*_instrument_families(runs), *_run_families(runs), *_watch_families(watch)]


def metric_names() -> set[str]:
    """Every name that a scrape may hold, as Prometheus stores it; for rules and dashboards."""
    return {
        f"{metric.name}_total" if metric.type == "counter" else metric.name
        for metric in families([], WatchFacts(polled_at=0.0))
    }


def _gauge(name: str, text: str, labels: tuple[str, ...] = ("run",)) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, labels=labels)


def _counter(name: str, text: str, labels: tuple[str, ...] = ("run",)) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(name, text, labels=labels)


def _instrument_families(runs: list[RunFacts]) -> Iterator[Metric]:
    for row in exported_instruments():
        yield _of_records(runs, gauge_name(row), f"{row.title}, {row.unit}", row.record, row.key)
    for name, (kind, key, text) in RECORD_GAUGES.items():
        yield _of_records(runs, name, text, kind, key)


def _of_records(runs: list[RunFacts], name: str, text: str, kind: str, key: str) -> Metric:
    metric = _gauge(name, text)
    for run in runs:
        value = number(run.latest.get(kind, {}).get(key))
        if value is not None:
            metric.add_metric([run.name], value)
    return metric


def _run_families(runs: list[RunFacts]) -> list[Metric]:
    step = _gauge("trinity_last_step", "The last finished step.")
    at = _gauge("trinity_last_step_timestamp_seconds", "When a step was last seen, unix seconds.")
    tokens = _counter("trinity_tokens", "Tokens trained on; repeated ones count again.")
    bad = _gauge("trinity_bad_lines", "Lines of the run's record that are no records.")
    state = _gauge("trinity_run_state", "1 for the state that the run is in.", ("run", "state"))
    source = _gauge("trinity_source_loss", "Validation loss of a source.", ("run", "source"))
    share = _gauge(
        "trinity_expert_load_share",
        "Load of an expert layer: least and most loaded expert in fair shares; entropy as a share "
        "of the most possible.",
        ("run", "layer", "stat"),
    )
    events = _counter("trinity_events", "Events of the run's journal.", ("run", "event"))
    alarms = _counter("trinity_alarms", "Alarms of the run.", ("run", "name", "severity"))
    for run in runs:
        for metric, value in ((step, run.last_step), (at, run.last_progress)):
            if value is not None:
                metric.add_metric([run.name], value)
        if run.tokens_total is not None:
            tokens.add_metric([run.name], run.tokens_total)
        bad.add_metric([run.name], run.num_bad_lines)
        for known in STATES:
            state.add_metric([run.name, known], float(known == run.state))
        for name, value in _source_losses(run.latest.get("validation", {})):
            source.add_metric([run.name, name], value)
        for layer, shares in enumerate(run.load_shares[:MAX_LAYERS]):
            for stat, value in zip(("min", "max", "entropy"), shares, strict=True):
                share.add_metric([run.name, str(layer), stat], value)
        for event in (*KNOWN_EVENTS, OTHER):
            events.add_metric([run.name, event], run.events.get(event, 0))
        for name, severity in alarm_labels():
            alarms.add_metric([run.name, name, severity], run.alarms.get((name, severity), 0))
    return [step, at, tokens, bad, state, source, share, events, alarms]


def alarm_labels() -> list[tuple[str, str]]:
    """Every (name, severity) that alarms are counted under."""
    known = [(row.name, row.severity) for row in instruments().values()]
    return [*known, *((OTHER, severity) for severity in SEVERITIES)]


def _source_losses(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    losses = [
        (printable(name), value)
        for name, raw in record.items()
        if name not in ("kind", "step", "time", "loss") and (value := number(raw)) is not None
    ]
    return losses[:MAX_SOURCES]


def printable(text: str) -> str:
    """A label's value that can be encoded, whatever bytes a file's name or a record held."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _watch_families(watch: WatchFacts) -> list[Metric]:
    polled = _gauge(
        "trinity_watch_last_poll_timestamp_seconds",
        "When the watcher last looked at the runs, unix seconds.",
        (),
    )
    left_out = _gauge("trinity_watch_runs_left_out", "Runs that are not exported.", ())
    pending = _gauge("trinity_webhook_pending", "Messages that wait for delivery.", ())
    errors = _counter("trinity_watch_errors", "Files that could not be read.", ())
    posts = _counter("trinity_webhook_messages", "Messages by what came of them.", ("result",))
    polled.add_metric([], watch.polled_at)
    left_out.add_metric([], watch.num_left_out)
    pending.add_metric([], watch.pending)
    errors.add_metric([], watch.num_errors)
    for result in ("sent", "failed", "dropped"):
        posts.add_metric([result], getattr(watch, result))
    return [polled, left_out, pending, errors, posts]


class MetricsServer:
    """Serves the families that were last published, from a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises ConfigError when the address cannot be had."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise ConfigError(
                "trinity watch needs the package prometheus-client; install it with "
                "pip install 'trinity-pretrain[watch]'"
            ) from None
        self._families: list[Metric] = []
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve on --host {host} --port {port}: {error}; choose another port"
            ) from None
        self.port: int = self._server.server_port

    def publish(self, metrics: list[Metric]) -> None:
        """What scrapes return from now on; the list must not be changed afterwards."""
        self._families = metrics

    def collect(self) -> list[Metric]:
        """Called by prometheus_client for each scrape, in its thread."""
        return self._families

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
