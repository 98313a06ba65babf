"""Scans by other packages, by name; each imported when it is first used.

None is ever chosen by "auto": they are there to compare with, and for those who trust them more.
What each cannot do is refused, with the reason (docs/backends.md has the table):

``mamba-ssm``  power 1, no grouped queries. Its decay and its factor on the values are one number,
               so values are divided by the decay's before it multiplies by it: fp32 only inside.
``fla``        power 1, any heads, documents.
``retention``  power 2, normalised, no documents and no initial state; values as wide as keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.scan_inputs import ScanInputs, heads_of, runs_of
from trinity.ops.squared_state import second_order_final_state

MAMBA_CHUNK_TOKENS = 256
"""The default of the package's own layer."""
RETENTION_CHUNK_TOKENS = 1024
RETENTION_QUADRATIC_TOKENS = 8192
"""Up to here its authors' timings prefer the quadratic kernel at width 64."""
LEAST_RATE = 1e-6
"""A decay of less per token is taken for this by ``mamba-ssm``: values are divided by it."""


def mamba_ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """``mamba_chunk_scan_combined`` of mamba-ssm (arXiv 2405.21060); see ``scan``.

    With dt = -log_decay, A = -1 and x = v / dt its exp(dt A) and dt x are our decay and value.

    Raises:
        ConfigError: the package is absent, or power 2 or grouped queries are asked for.
    """
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    if inputs.power != 1:
        _refuse("mamba-ssm", f"has no scan of power {inputs.power}")
    if heads.queries_per_key > 1:
        _refuse("mamba-ssm", "has no grouped queries")
    function = imported(
        "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm"
    )
    dt_BSU = (-inputs.log_decay).float().clamp_min(LEAST_RATE)
    run_BS = None if inputs.document_ids is None else runs_of(inputs.document_ids).int()
    state = inputs.initial_state
    out_BSUe, state = function(
        inputs.v.float() / dt_BSU.unsqueeze(-1),
        dt_BSU,
        -torch.ones_like(dt_BSU[0, 0]),
        inputs.k.float(),
        inputs.scaled_q.float(),
        MAMBA_CHUNK_TOKENS,
        initial_states=None if state is None else state.mT.contiguous(),
        seq_idx=run_BS,
        return_final_states=True,
    )
    return out_BSUe.to(inputs.dtype), state.mT if inputs.return_state else None


def retention_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """``power_retention`` of retention, of degree 2; see ``scan``. Its reference on a CPU.

    It adds 1e-6 to the sum of the weights, relative to the largest. Its states have a layout of
    their own, so that the final state is made by our own sum over the row.

    Raises:
        ConfigError: the package is absent, or what it cannot do is asked for.
    """
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    dim, value_dim = inputs.k.shape[-1], inputs.v.shape[-1]
    if inputs.power != 2 or not inputs.normalize:
        _refuse("retention", "divides by the sum of squared weights, and does nothing else")
    if inputs.document_ids is not None:
        _refuse("retention", "knows no documents")
    if inputs.initial_state is not None:
        _refuse("retention", "keeps states in another layout, so that none can be handed to it")
    if heads.values_per_key > 1:
        _refuse("retention", "wants as many heads of keys as of values")
    if dim % 16 or dim != value_dim:
        _refuse("retention", f"wants one width, a multiple of 16, not {dim} and {value_dim}")
    module = "retention" if inputs.q.is_cuda else "retention.reference"
    function = imported(module, "power_retention", "retention")
    is_short = inputs.q.shape[1] <= RETENTION_QUADRATIC_TOKENS
    out_BSHe = function(
        inputs.q,
        inputs.k,
        inputs.v,
        log_G=inputs.log_decay.float(),
        deg=2,
        scale=inputs.scale,
        chunk_size=None if is_short else RETENTION_CHUNK_TOKENS,
    )
    if not inputs.return_state:
        return out_BSHe, None
    ones = inputs.v.new_ones(*inputs.v.shape[:-1], 1)
    with_sums = inputs._replace(v=torch.cat((inputs.v, ones), dim=-1))
    return out_BSHe, second_order_final_state(with_sums)


def fla_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """``chunk_simple_gla`` of flash-linear-attention; see ``scan``.

    It has one head of everything per state and documents only in a single row: heads are repeated,
    and rows laid end to end where there are documents.

    Raises:
        ConfigError: the package is absent, or power 2 is asked for.
    """
    if inputs.power != 1:
        _refuse("fla", f"has no scan of power {inputs.power} that decays")
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    function = imported("fla.ops.simple_gla", "chunk_simple_gla", "flash-linear-attention")
    r, m = heads.queries_per_key, heads.values_per_key
    tokens = [
        inputs.q.repeat_interleave(m, dim=2),
        inputs.k.repeat_interleave(r * m, dim=2),
        inputs.v.repeat_interleave(r, dim=2),
        inputs.log_decay.float().repeat_interleave(r, dim=2),
    ]
    state = inputs.initial_state
    state = None if state is None else state.repeat_interleave(r, dim=1)
    options: dict[str, Any] = {"scale": inputs.scale, "output_final_state": True}
    batch, num_tokens = inputs.q.shape[:2]
    last_B = slice(None)
    if inputs.document_ids is not None:
        bounds, first_B, last_B = _laid_end_to_end(inputs.document_ids)
        options["cu_seqlens"] = bounds
        tokens = [x.reshape(1, -1, *x.shape[2:]) for x in tokens]
        if state is not None:
            all_states = state.new_zeros(len(bounds) - 1, *state.shape[1:])
            state = all_states.index_copy(0, first_B, state)
    out_BSHe, state = function(*tokens, initial_state=state, **options)
    out_BSHe = out_BSHe.reshape(batch, num_tokens, *out_BSHe.shape[2:])
    return out_BSHe, state[last_B, ::r] if inputs.return_state else None


def _laid_end_to_end(document_ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where documents begin and end in all rows as one, and numbers of rows' first and last."""
    run_BS = runs_of(document_ids_BS)
    begins_BS = torch.ones_like(run_BS, dtype=torch.bool)
    begins_BS[:, 1:] = run_BS[:, 1:] != run_BS[:, :-1]
    starts = begins_BS.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([begins_BS.numel()])))
    last_B = (run_BS[:, -1] + 1).cumsum(0) - 1
    return bounds, last_B - run_BS[:, -1], last_B


def imported(module: str, name: str, package: str) -> Callable[..., Any]:
    """A function of an optional package.

    Raises:
        ConfigError: it cannot be imported; a package without what it runs on counts as absent.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"this scan backend needs the package {package}, which cannot be used here "
            f"({type(error).__name__}: {error}); run `pip install 'trinity-pretrain[cuda]'`, "
            'or use backend="auto"'
        ) from error


def _refuse(backend: str, reason: str) -> NoReturn:
    raise ConfigError(f'scan backend {backend!r} {reason}; use backend="auto"')
