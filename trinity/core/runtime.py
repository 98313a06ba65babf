"""The one place that asks what the machine can do: devices, precision, threads, backends."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import resource
import signal
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from trinity.core.errors import ConfigError

Precision = Literal["bf16", "fp32", "fp64"]

SAVED_AND_STOPPED_EXIT_CODE = 75
"""Exit status after a signal-triggered save: EX_TEMPFAIL, "try again later"; resume continues."""


def choose_device(name: str) -> torch.device:
    """Resolve "auto", "cpu" or "cuda[:n]". Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f'train.device={name!r} is not a device; use "auto", "cpu" or "cuda"'
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'train.device={name!r}: no CUDA device is visible; use "cpu" or "auto"')
    return device


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype matrix products run in."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]


def autocast(
    device: torch.device, precision: Precision
) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for a forward pass: bf16 products over fp32 parameters, or nothing."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def autocast_disabled(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep the dtypes inside exactly as they are, for arithmetic that must not be narrowed."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def has_fp8() -> bool:
    """Whether there is a GPU with FP8 units (compute capability 8.9 or newer)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def set_threads(num_threads: int) -> None:
    """Fix the number of CPU threads, 0 keeps torch's; only equal counts give equal bits."""
    if num_threads:
        torch.set_num_threads(num_threads)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may: every shard of tokens is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 arrived.

    The handler only sets a flag: it may run twice, and while the interpreter shuts down.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handle SIGTERM and SIGUSR1 inside the ``with`` block, then restore what was there.

        After one arrived they are ignored from then on: the process is about to end by itself, and
        a repeated request must not change its exit status.
        """
        watched = (signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._remember) for number in watched}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if self else handler)

    def _remember(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number)


class Backend(NamedTuple):
    """An optional package and whether it can be used here."""

    package: str
    purpose: str
    extra: str
    active: bool
    detail: str
    """Its version, or the reason why it is not active."""


OPTIONAL_PACKAGES = (
    ("transformers", "transformers", "Hugging Face model parity and tokenizers", "hf"),
    ("flash-attn", "flash_attn", "attention kernels on GPU", "cuda"),
    ("transformer-engine", "transformer_engine.pytorch", "FP8 linears on GPU", "cuda"),
    ("torchao", "torchao.float8", "FP8 linears on GPU, emulated elsewhere", "fp8"),
    ("mamba-ssm", "mamba_ssm", "state-space kernels on GPU", "cuda"),
    ("retention", "retention", "squared-attention kernels on GPU", "cuda"),
    ("flash-linear-attention", "fla", "linear-attention kernels on GPU", "cuda"),
    ("megatron-core", "megatron.core", "Megatron data interchange and engine", "megatron"),
    ("deepspeed", "deepspeed", "ZeRO and CPU-offload engine", "deepspeed"),
    ("triton", "triton", "our own GPU kernels", "cuda"),
)


def optional_backends() -> list[Backend]:
    """Try every optional package. Slow (imports them); for ``trinity doctor`` only."""
    return [_probe(*row) for row in OPTIONAL_PACKAGES]


def _probe(package: str, module: str, purpose: str, extra: str) -> Backend:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        detail = f'not installed; pip install "trinity-pretrain[{extra}]"'
        return Backend(package, purpose, extra, False, detail)
    try:
        importlib.import_module(module)
    # A half-installed CUDA package fails in all of these ways on a machine without a GPU.
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        reason = f"{version} is installed but does not import: {error}"
        return Backend(package, purpose, extra, False, reason)
    return Backend(package, purpose, extra, True, version)


class Moment:
    """A point in the work of a device, which a GPU may reach later than the host."""

    def __init__(self, device: torch.device) -> None:
        self._host_s = time.perf_counter()
        self._event: torch.Event | None = None
        if device.type != "cpu":
            self._event = torch.Event(device, enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Until everything before it is done."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Between two moments of one device that were both reached."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        earlier._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of tensors on a GPU; resident, of the whole process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Peak dense FLOP/s that model FLOP utilisation (MFU) is measured against.

    For known GPUs the vendor's dense bf16 figure; for a CPU, whose sheet has no such figure, the
    speed of one large product here and now, measured in about a second. None when unknown.
    """
    if device.type == "cpu":
        return _measured_matmul_flops(compute_dtype(precision))
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in GPU_BF16_FLOPS.items() if part in name), None)


GPU_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "B300": 2250e12}


def _measured_matmul_flops(dtype: torch.dtype, size: int = 1024, spent_s: float = 0.2) -> float:
    """The best of a fifth of a second, so that one moment's other load counts for little."""
    a = torch.ones(size, size, dtype=dtype)
    durations_s: list[float] = []
    while sum(durations_s) < spent_s or len(durations_s) < 5:
        start_s = time.perf_counter()
        torch.mm(a, a)
        durations_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(durations_s)


def forget_meshes() -> None:
    """Empty what DTensor remembers of operations.

    It holds device meshes, with the place of this process in them, and takes a mesh of a later
    process group for one of an earlier group that merely looks the same.
    """
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)  # not in every release
    if clear is None:
        from torch.distributed.tensor import DTensor

        clear = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear
    clear()
