"""Dynamic patches inside other people's sampling loops: an object that replaces the transformer.

A pipeline of diffusers calls its transformer with latents and a noise level and knows nothing of
patches. ``DynamicTransformer`` takes the transformer's place, watches the latents go by, and
answers each call at the size the scheduler chooses. Caches that skip computation (first block,
Taylor) keep what belongs to one size and one set of rows: each such group has its own, and it is
thrown away as soon as a step runs without the group, so nothing of another token count, or of other
rows, or of long ago is ever put back.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trinity.core.errors import ConfigError
from trinity.models.patch_adapter import PatchAdapter
from trinity.models.patch_hosts import PipelineHost
from trinity.models.patch_sampler import PatchPath, PatchPolicy, PatchRecord, by_groups, check_fit

SPLIT_CACHES = {"fbc_leader_block_hook", "fbc_block_hook", "taylorseer_cache"}
"""Hooks of diffusers whose state is kept by the name of a context and knows no step numbers of the
whole run: apply_first_block_cache and apply_taylorseer_cache."""

Group = tuple[int, Tensor]
"""A scale, and the rows that run at it."""


class GroupCaches:
    """Gives every group of rows its own state in the caches of a model from diffusers."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._names: dict[str, set[str]] = {}
        """Names of contexts in use, by group."""

    def check(self) -> None:
        """Raise ConfigError for a cache that cannot be kept apart by group."""
        for registry in self._registries():
            for name, hook in registry.hooks.items():
                if hook._is_stateful and name not in SPLIT_CACHES:
                    raise ConfigError(
                        f"dynamic patches: the cache {name} does not follow changes of the patch "
                        "size: disable it; the first block cache and TaylorSeer do"
                    )

    def keep_only(self, groups: list[Group]) -> None:
        """Forget what is cached for groups that do not run in this step."""
        wanted = {_group_name(*group) for group in groups}
        gone = self._names.keys() - wanted
        if not gone:
            return
        names = set().union(*(self._names.pop(group) for group in gone))
        for registry in self._registries():
            for hook in registry.hooks.values():
                for value in vars(hook).values():
                    # diffusers offers to forget all or nothing.
                    states = getattr(value, "_state_cache", {})
                    for name in names & states.keys():
                        del states[name]

    def entered(
        self, context: tuple[str, Mapping[str, Any]] | None, group: Group
    ) -> contextlib.AbstractContextManager[None]:
        """The model's cache context for a group, within the context that the caller entered.

        Without one there is none for the group either: a cache then refuses, as it does anyway.
        """
        if context is None:
            return contextlib.nullcontext()
        name, fields = context
        group_name = _group_name(*group)
        own_name = f"{name}, {group_name}"
        self._names.setdefault(group_name, set()).add(own_name)
        model: Any = self._base
        return model.cache_context(own_name, **fields)

    def _registries(self) -> Iterator[Any]:
        for module in self._base.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None:
                yield registry


def _group_name(scale: int, rows_N: Tensor) -> str:
    return f"size {scale}, rows {rows_N.tolist()}"


class DynamicTransformer(nn.Module):
    """Stands where a pipeline expects its transformer, and runs it on patches of dynamic size.

    Same call, same answer's form, same attributes. A run begins when sigma rises, when the latents'
    shape changes, or by ``reset``: call that after a run that was broken off. Two calls at one
    noise level (conditional and not) share one decision.

    Answers are float32 even if the model is not, and so is ``dtype``: pipelines then keep their
    latents in float32, without which the path's bend is lost in rounding. The last answer of a run
    has the dtype of its first call, as decoders expect. Saving the pipeline saves no adapter; put
    the transformer back first (``dynamic_patches`` does). Reading the noise level waits for the
    device, once per call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: PatchAdapter,
        scheduler: PatchPolicy,
        *,
        num_steps: int | None = None,
        noise_schedule: Any = None,
    ) -> None:
        """Raises ConfigError when the parts do not fit each other.

        Args:
            transformer: the model that the pipeline had.
            adapter: over a ``PipelineHost`` of that model.
            scheduler: chooses the sizes.
            num_steps: steps of a run, for pipelines that do not tell (Wan's does).
            noise_schedule: or the pipeline's scheduler, whose ``timesteps`` are counted.
        """
        super().__init__()
        if adapter.host.base is not transformer:
            raise ConfigError(
                "dynamic transformer: the adapter's host holds another model: make the host from "
                "the very transformer of the pipeline"
            )
        if not isinstance(adapter.host, PipelineHost):
            raise ConfigError(
                f"dynamic transformer: {type(adapter.host).__name__} cannot read the calls of a "
                "pipeline: use a host that can (see PipelineHost), or sample with patch_sampler"
            )
        check_fit(adapter, scheduler)
        self.transformer = transformer
        self.adapter = adapter
        self.patch_scheduler = scheduler
        self._host = adapter.host
        self._num_steps, self._noise_schedule = num_steps, noise_schedule
        self._signature = inspect.signature(type(transformer).forward)
        self._caches = GroupCaches(transformer)
        self._context: tuple[str, dict[str, Any]] | None = None
        self._path: PatchPath | None = None
        self._num_tokens = 0
        self._caller_dtype = torch.float32

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model (``config``, ``device``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    @property
    def dtype(self) -> torch.dtype:
        """What callers should compute in: float32."""
        return torch.float32

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Tell which of the calls of a step follows (and where the loop is), as the model's own."""
        self._context = (name, fields)
        try:
            yield
        finally:
            self._context = None

    def reset(self) -> None:
        """Forget the run: the next call begins a new one."""
        self._path = None
        self._caches.keep_only([])

    def record(self) -> PatchRecord:
        """Sizes, statistics and tokens of the run so far. ConfigError before the first call."""
        if self._path is None:
            raise ConfigError("dynamic transformer: no run to report: call the pipeline first")
        return self._path.record(self._num_tokens)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the model.

        Raises ConfigError for calls that coarse patches cannot serve, an unknown number of steps,
        noise levels that differ within the batch, and latents kept in half precision.
        """
        bound = self._signature.bind(self.transformer, *args, **kwargs).arguments
        call = self._host.read_call(bound)
        latents = call.z[:, : self._host.geometry.out_channels]
        sigma = self._sigma_of(call.sigma_B)
        path = self._path_of(latents, sigma)
        if path.step == -1 or (path.step == 0 and path.is_same_step(sigma)):
            latents = latents.to(self._exact_dtype(latents))  # noise in few digits is still exact
        groups = path.decide(latents, sigma).groups()
        self._caches.keep_only(groups)

        def velocity(z: Tensor, _sigma: float, scale: int, rows_N: Tensor) -> Tensor:
            sigma_N = call.sigma_B[rows_N.cpu()]
            with self._caches.entered(self._context, (scale, rows_N)):
                return self.adapter(z, sigma_N, self._host.take(call.condition, rows_N), scale)

        sample = self._host.write_sample(by_groups(velocity, groups, call.z, sigma))
        is_last = path.step == path.num_steps - 1
        sample = sample.to(self._caller_dtype if is_last else self._exact_dtype(sample))
        if not bound.get("return_dict", True):
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _sigma_of(self, sigma_B: Tensor) -> float:
        sigmas = set(sigma_B.tolist())
        if len(sigmas) != 1:
            raise ConfigError(
                f"dynamic transformer: rows at noise levels {sorted(sigmas)}: only batches whose "
                "rows go together are supported"
            )
        told = None if self._context is None else self._context[1].get("sigma")
        return sigmas.pop() if told is None else float(told)

    def _path_of(self, latents: Tensor, sigma: float) -> PatchPath:
        """The path that a call belongs to, a new one where a run begins."""
        if self._path is not None and self._path.continues(latents, sigma):
            return self._path
        self.reset()
        self._caches.check()
        self._caller_dtype = latents.dtype
        self._num_tokens = self._host.geometry.num_tokens(tuple(latents.shape[2:]))
        self._path = PatchPath(self.patch_scheduler, self._run_steps())
        return self._path

    def _run_steps(self) -> int:
        told = None if self._context is None else self._context[1].get("num_inference_steps")
        if told is not None:
            return int(told)
        if self._noise_schedule is not None:
            return len(set(self._noise_schedule.timesteps.tolist()))
        if self._num_steps is None:
            raise ConfigError(
                "dynamic transformer: the pipeline does not tell its number of steps: pass "
                "num_steps, or its scheduler as noise_schedule"
            )
        return self._num_steps

    @staticmethod
    def _exact_dtype(tensor: Tensor) -> torch.dtype:
        return torch.promote_types(tensor.dtype, torch.float32)


@contextlib.contextmanager
def dynamic_patches(
    pipe: Any, adapter: PatchAdapter, scheduler: PatchPolicy
) -> Iterator[DynamicTransformer]:
    """While entered, ``pipe`` (a pipeline of diffusers) samples with dynamic patches.

    Yields what stands in place of ``pipe.transformer``: ask it for the ``record`` of the last run.
    Raises ConfigError as ``DynamicTransformer``.
    """
    transformer = pipe.transformer
    dynamic = DynamicTransformer(transformer, adapter, scheduler, noise_schedule=pipe.scheduler)
    pipe.transformer = dynamic
    try:
        yield dynamic
    finally:
        pipe.transformer = transformer
