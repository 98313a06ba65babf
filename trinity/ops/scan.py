"""Linear-time token mixing: scans with a scalar decay per head, of first or second order.

``scan`` is the one entrance. For head h and tokens j <= i of one document,

    o_i = sum_j w_ij v_j,    w_ij = (scale q_i . k_j)^power exp(sum of log_decay over j+1 .. i),

with ``normalize`` divided by sum_j w_ij. Power 1 is the core of Mamba-2 (arXiv 2405.21060, q = C,
k = B, v = dt x) and of Mamba-2S, power 2 with ``normalize`` that of 2Mamba (arXiv 2602.17363). The
same as a recurrence, with phi(q) . phi(k) = (q . k)^power:

    state_t = exp(log_decay_t) state_(t-1) + phi(k_t) (x) v_t,    o_t = phi(q_t) . state_t,

where the scale stands on q for power 1 and on k for power 2 (whose sums it keeps small).

Its backends compute the same function:

``chunked``    quadratic inside chunks, a state between them: linear in the length. The default.
``quadratic``  the definition, every weight formed, in fp32 at least.
``recurrent``  the recurrence, token by token: the oracle of the tests, and decoding.
``triton``     kernels for GPUs (:mod:`trinity_kernels`).
``mamba-ssm``, ``retention``, ``fla``
               the packages of those names, where they can do what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.core.errors import ConfigError
from trinity.ops.chunked_scan import chunked_scan, first_order_final_state
from trinity.ops.common import accumulate_dtype, compute_dtype, exact_dtypes, not_traced
from trinity.ops.features import num_features, triangle_features
from trinity.ops.scan_backends import fla_scan, mamba_ssm_scan, retention_scan
from trinity.ops.scan_inputs import ScanInputs, heads_of, runs_of
from trinity.ops.squared_scan import squared_scan
from trinity.ops.squared_state import second_order_final_state
from trinity.ops.triton_backends import triton_scan

SMALLEST_SUM = 1e-30
"""What a sum of weights is at least divided by, so that rows without any become 0, not NaN."""


class Scanned(NamedTuple):
    """What a scan returns."""

    out_BSHe: Tensor
    """One head per query head or per state head, whichever are more."""
    state: Tensor | None
    """After the last token, of its document only; (B, U, d, e), fp32 at least; None unless asked
    for. For power 2, d(d+1)/2 features in place of d, the triangle of
    :mod:`trinity.ops.features`; with ``normalize`` one column more, the sum of the weights."""


@not_traced  # a compiler would unroll the loop over chunks
def scan(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSUe: Tensor,
    log_decay_BSU: Tensor,
    *,
    power: int = 1,
    normalize: bool = False,
    scale: float | None = None,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    backend: str = "auto",
) -> Scanned:
    """Mix the tokens of each row; see the module.

    Args:
        q_BSHd: queries.
        k_BSGd: keys. Either H is a multiple of G = U, and query head h reads state head
            h // (H / G); or H = G and U is a multiple of G, and state head u has the keys and
            queries u // (U / G), as in Mamba-2.
        v_BSUe: values.
        log_decay_BSU: logarithm of the decay *before* each token, not positive. fp32 keeps it
            exact: sums of it run over many tokens.
        power: 1 or 2.
        normalize: divide by the sum of the weights; for power 2, whose weights are not negative.
        scale: factor on q . k; None is d ** -0.5.
        document_ids_BS: integers; a run of equal ids is a document, and nothing crosses its start.
        initial_state: as returned; it reaches the first document of each row.
        return_state: False saves the cost of the final state, which for power 2 is dear.
        backend: a key of ``BACKENDS``, or "auto" for the fastest on this device.

    Raises:
        ConfigError: shapes or options that do not fit, or a backend that cannot do this.
    """
    if power not in (1, 2) or (normalize and power != 2):
        raise ConfigError(f"no scan of power={power} with normalize={normalize}; see its docstring")
    heads_of(q_BSHd, k_BSGd, v_BSUe, log_decay_BSU)
    if backend == "auto":
        backend = "triton" if q_BSHd.is_cuda else "chunked"
    if backend not in BACKENDS:
        raise ConfigError(
            f"scan backend {backend!r} does not exist; use one of auto, {', '.join(BACKENDS)}"
        )
    inputs = _prepared(q_BSHd, k_BSGd, v_BSUe, log_decay_BSU, power, normalize, scale)._replace(
        document_ids=document_ids_BS, initial_state=initial_state, return_state=return_state
    )
    with exact_dtypes(q_BSHd):
        out_BSHe, state = BACKENDS[backend](inputs)
        if normalize:
            out_BSHe = _lone_values(out_BSHe, inputs)
        return Scanned(out_BSHe, state if return_state else None)


@not_traced
def final_state(
    k_BSGd: Tensor,
    v_BSUe: Tensor,
    log_decay_BSU: Tensor,
    *,
    power: int = 1,
    normalize: bool = False,
    scale: float | None = None,
    document_ids_BS: Tensor | None = None,
) -> Tensor:
    """``scan(...).state`` without the outputs and from an empty state.

    What a rank must know of those before it when a row is split over ranks.
    """
    inputs = _prepared(k_BSGd, k_BSGd, v_BSUe, log_decay_BSU, power, normalize, scale)._replace(
        document_ids=document_ids_BS
    )
    with exact_dtypes(k_BSGd):
        if power == 1:
            return first_order_final_state(inputs)
        return second_order_final_state(_with_ones(inputs))


def _prepared(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSUe: Tensor,
    log_decay_BSU: Tensor,
    power: int,
    normalize: bool,
    scale: float | None,
) -> ScanInputs:
    """Cast once: products run in autocast's type, decays stay wide."""
    dtype = compute_dtype(q_BSHd)
    return ScanInputs(
        q_BSHd.to(dtype),
        k_BSGd.to(dtype),
        v_BSUe.to(dtype),
        log_decay_BSU.to(accumulate_dtype(log_decay_BSU.dtype)),
        power,
        normalize,
        q_BSHd.shape[-1] ** -0.5 if scale is None else scale,
    )


def decode_step(
    q_BHd: Tensor,
    k_BGd: Tensor,
    v_BUe: Tensor,
    log_decay_BU: Tensor,
    state: Tensor,
    *,
    power: int = 1,
    normalize: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: its output (B, H, e) and the next state."""
    out, after = scan(
        q_BHd[:, None],
        k_BGd[:, None],
        v_BUe[:, None],
        log_decay_BU[:, None],
        power=power,
        normalize=normalize,
        scale=scale,
        initial_state=state,
        backend="recurrent",
    )
    assert after is not None
    return out[:, 0], after


def empty_state(k_BSGd: Tensor, v_BSUe: Tensor, *, power: int, normalize: bool) -> Tensor:
    """The state before the first token, all zeros."""
    batch, _, num_heads, value_dim = v_BSUe.shape
    shape = (batch, num_heads, num_features(k_BSGd.shape[-1], power), value_dim + int(normalize))
    return v_BSUe.new_zeros(shape, dtype=accumulate_dtype(v_BSUe.dtype))


def recurrent_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Token by token."""
    inputs = _with_ones(inputs.widened())
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    state = inputs.initial_state
    if state is None:
        state = empty_state(inputs.k, inputs.v, power=inputs.power, normalize=False)
    decay_BSU = inputs.log_decay.exp()
    if inputs.document_ids is not None:
        run_BS = runs_of(inputs.document_ids)
        continues_BS = torch.cat((run_BS[:, :1] == 0, run_BS[:, 1:] == run_BS[:, :-1]), dim=1)
        decay_BSU = decay_BSU * continues_BS.unsqueeze(-1)
    feature = triangle_features if inputs.power == 2 else torch.Tensor.contiguous
    k_BSUf = feature(inputs.scaled_k).repeat_interleave(heads.values_per_key, dim=2)
    q_BSHf = feature(inputs.scaled_q).repeat_interleave(heads.values_per_key, dim=2)
    outs: list[Tensor] = []
    for t in range(inputs.q.shape[1]):
        grown = k_BSUf[:, t].unsqueeze(-1) * inputs.v[:, t].unsqueeze(-2)
        state = decay_BSU[:, t, :, None, None] * state + grown
        read = state.repeat_interleave(heads.queries_per_key, dim=1)
        outs.append((q_BSHf[:, t].unsqueeze(-2) @ read).squeeze(-2))
    return _divided(torch.stack(outs, dim=1), inputs), state


def quadratic_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Every weight formed; memory grows with the square of the length."""
    inputs = _with_ones(inputs.widened())
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    sums_BUS = inputs.log_decay.cumsum(1).transpose(1, 2)
    num_tokens = inputs.q.shape[1]
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=inputs.q.device).triu(1)
    first_BS = torch.ones(inputs.q.shape[:2], dtype=torch.bool, device=inputs.q.device)
    if inputs.document_ids is not None:
        run_BS = runs_of(inputs.document_ids)
        hidden = hidden | (run_BS[:, :, None] != run_BS[:, None, :])[:, None]
        first_BS = run_BS == 0
    # Masked before exp: above the diagonal it overflows.
    log_BUSS = sums_BUS.unsqueeze(-1) - sums_BUS.unsqueeze(-2)
    decay_BHSS = log_BUSS.masked_fill(hidden, float("-inf")).exp()
    decay_BHSS = decay_BHSS.repeat_interleave(heads.queries_per_key, dim=1)
    q_BHSd = inputs.scaled_q.transpose(1, 2).repeat_interleave(heads.values_per_key, dim=1)
    k_BUSd = inputs.scaled_k.transpose(1, 2).repeat_interleave(heads.values_per_key, dim=1)
    v_BUSe = inputs.v.transpose(1, 2)
    k_BHSd, v_BHSe = (x.repeat_interleave(heads.queries_per_key, dim=1) for x in (k_BUSd, v_BUSe))
    weights_BHSS = (q_BHSd @ k_BHSd.mT) ** inputs.power * decay_BHSS
    out_BHSe = weights_BHSS @ v_BHSe
    feature = triangle_features if inputs.power == 2 else torch.Tensor.contiguous
    # The last row of decays says how much of each token is left at the end.
    left_BUS = decay_BHSS[:, :: heads.queries_per_key, -1]
    state = feature(k_BUSd).mT @ (left_BUS.unsqueeze(-1) * v_BUSe)
    if inputs.initial_state is not None:
        reach_BUS = sums_BUS.exp() * first_BS.unsqueeze(1)
        seen = (feature(q_BHSd).unflatten(1, (-1, heads.queries_per_key))) @ (
            inputs.initial_state.unsqueeze(2)
        )
        seen = seen * reach_BUS[:, :, None, :, None]
        out_BHSe = out_BHSe + seen.flatten(1, 2)
        state = state + reach_BUS[:, :, -1, None, None] * inputs.initial_state
    return _divided(out_BHSe.transpose(1, 2), inputs), state


def _chunked(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    if inputs.power == 1:
        return chunked_scan(inputs)
    inputs = _with_ones(inputs)
    out_BSHe, state = squared_scan(inputs)
    return _divided(out_BSHe, inputs), state


def _with_ones(inputs: ScanInputs) -> ScanInputs:
    """A column of ones beside the values: what it becomes is the sum of the weights."""
    if not inputs.normalize:
        return inputs
    ones = inputs.v.new_ones(*inputs.v.shape[:-1], 1)
    return inputs._replace(v=torch.cat((inputs.v, ones), dim=-1))


def _divided(out_BSHe: Tensor, inputs: ScanInputs) -> Tensor:
    """The sums of values over the sums of weights.

    Read from a state, a sum of weights is wrong by rounding errors of |q|^2 |k|^2, and can come out
    negative where q is orthogonal to every key: such rows fade to 0 instead of blowing up. The more
    tokens a row sees the less likely that is; rows of one token are left to ``_lone_values``.
    """
    if inputs.normalize:
        with torch.no_grad():
            wide = out_BSHe.dtype
            q_BSH1, k_BSU1 = (x.to(wide).norm(dim=-1, keepdim=True) for x in (inputs.q, inputs.k))
            heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
            k_BSH1 = k_BSU1.repeat_interleave(heads.queries_per_key, dim=2)
            least = (inputs.scale * q_BSH1 * k_BSH1).square() * torch.finfo(wide).eps
            least = least.repeat_interleave(heads.values_per_key, dim=2).clamp(min=SMALLEST_SUM)
        values_BSHe, sums_BSH1 = out_BSHe[..., :-1], out_BSHe[..., -1:]
        # No gradient through a row that fades: divided by so little it would be all noise.
        faded_BSHe = values_BSHe.detach() / least
        divided_BSHe = values_BSHe / sums_BSH1.maximum(least)
        out_BSHe = torch.where(sums_BSH1 > least, divided_BSHe, faded_BSHe)
    return out_BSHe.to(inputs.dtype)


def _lone_values(out_BSHe: Tensor, inputs: ScanInputs) -> Tensor:
    """The outputs, with v itself for tokens that see no other: w v / w.

    However small w is; and with no gradient to q and k, where rounding errors over w would reach
    any size.
    """
    lone_BSU = torch.zeros_like(inputs.log_decay, dtype=torch.bool)
    lone_BSU[:, 0] = True
    if inputs.initial_state is not None:
        # Its last column sums up weights: all zeros if and only if no token is in it.
        lone_BSU[:, 0] = ~inputs.initial_state[..., -1].detach().any(-1)
    if inputs.document_ids is not None:
        ids_BS = inputs.document_ids
        lone_BSU[:, 1:] = (ids_BS[:, 1:] != ids_BS[:, :-1]).unsqueeze(-1)
    heads = heads_of(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    lone_BSH = lone_BSU.repeat_interleave(heads.queries_per_key, dim=2)
    v_BSHe = inputs.v.repeat_interleave(heads.queries_per_key, dim=2)
    return torch.where(lone_BSH.unsqueeze(-1), v_BSHe, out_BSHe)


BACKENDS: dict[str, Callable[[ScanInputs], tuple[Tensor, Tensor | None]]] = {
    "chunked": _chunked,
    "quadratic": quadratic_scan,
    "recurrent": recurrent_scan,
    "triton": triton_scan,
    "mamba-ssm": mamba_ssm_scan,
    "retention": retention_scan,
    "fla": fla_scan,
}
