"""The entrances: checks in plain words, then the kernels. Triton is imported at the first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from trinity_kernels.decay import clamp_log_decay, leaving_weight
from trinity_kernels.layout import check_conv, check_scan, check_state, matmul_precision
from trinity_kernels.tuning import ANY_WIDTH, settings


class KernelsUnavailableError(RuntimeError):
    """The kernels cannot run here; the message says what is missing."""


def interpreting() -> bool:
    """Whether Triton interprets kernels on CPU tensors instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def _kernels(name: str, tensor: Tensor) -> ModuleType:
    """The module that launches a kernel, once Triton and a device for it are there."""
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailableError(
            "trinity_kernels needs Triton. CUDA builds of PyTorch bring it along; elsewhere "
            "install the `dev` extra of trinity-pretrain, or `pip install triton`."
        )
    if not tensor.is_cuda and not interpreting():
        raise KernelsUnavailableError(
            f"trinity_kernels got tensors on {tensor.device}. They run on CUDA devices; on a CPU "
            "only under TRITON_INTERPRET=1, set before Triton is imported (slow, for tests)."
        )
    return importlib.import_module(f"trinity_kernels.{name}")


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _optional(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def first_order_scan(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o_i = scale * sum over j <= i of the same document of (q_i . k_j) exp(S_i - S_j) v_j.

    As a recurrence: state_t = exp(A_t) state_{t-1} + k_t (x) v_t and o_t = scale * q_t state_t,
    with S the running sum of the log decay A.

    Args:
        q_BSHd: queries. Either H is a multiple of G = V, or V a multiple of G = H.
        k_BSGd: keys. d and e are of 16, 32, 64, 128; fp32, bf16 or fp16.
        v_BSVe: values.
        log_decay_BSV: A <= 0; -inf empties the state.
        scale: factor of q . k.
        document_ids_BS: integers, non-decreasing along a row; a state ends with its document.
        initial_state: (B, V, d, e), read by the row's first document only. Zero when None.
        chunk_size: positions per tile, a power of two in 16..128; from the tuning table when None.
        precision: of tile products, "ieee", "tf32" or "tf32x3". When None "ieee" for fp32 inputs,
            whose results are then of fp32's grade, and "tf32" for 16-bit ones.

    Returns:
        o (B, S, max(H, V), e) in the dtype of v, and the state after the last token, that of the
        row's last document, (B, V, d, e) fp32. Gradients flow to q, k, v, log decay and the
        initial state, from both results.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit.
        KernelsUnavailableError: no Triton, or no CUDA device and no interpreter.

    Source: the chunked algorithm of Mamba-2 (arXiv 2405.21060, section 6).
    """
    heads = check_scan(q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, document_ids_BS)
    batch, _, num_states, e = v_BSVe.shape
    d = q_BSHd.shape[3]
    check_state(initial_state, (batch, num_states, d, e))
    chunk = chunk_size or settings("first_order", max(d, e), q_BSHd.device)["chunk"]
    if chunk not in (16, 32, 64, 128):
        raise ValueError(f"chunk_size {chunk} is not one of 16, 32, 64, 128")
    module = _kernels("first_order", q_BSHd)
    options = module.ScanOptions(
        heads, scale, chunk, matmul_precision(precision, q_BSHd, k_BSGd, v_BSVe)
    )
    tokens = _contiguous(q_BSHd, k_BSGd, v_BSVe, clamp_log_decay(log_decay_BSV))
    return module.FirstOrderScan.apply(
        *tokens, *_optional(_fp32(initial_state), document_ids_BS), options
    )


def first_order_final_state(
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    document_ids_BS: Tensor | None = None,
) -> Tensor:
    """The final state of ``first_order_scan`` from a zero initial state, (B, V, d, e) fp32.

    One product over all positions, sum_j exp(S_last - S_j) k_j (x) v_j over the row's last
    document; plain PyTorch, so it runs and differentiates anywhere.
    """
    if v_BSVe.shape[2] % k_BSGd.shape[2]:
        raise ValueError(f"{v_BSVe.shape[2]} value heads for {k_BSGd.shape[2]} key heads")
    weight_BSV = leaving_weight(log_decay_BSV, document_ids_BS)
    v_BSGre = (v_BSVe.float() * weight_BSV.unsqueeze(3)).unflatten(2, (k_BSGd.shape[2], -1))
    with torch.autocast(k_BSGd.device.type, enabled=False):  # a state is never of 16 bits
        return torch.einsum("bsgd,bsgre->bgrde", k_BSGd.float(), v_BSGre).flatten(1, 2)


def causal_conv(
    x_BSC: Tensor,
    weight_Cw: Tensor,
    bias_C: Tensor | None = None,
    *,
    document_ids_BS: Tensor | None = None,
    initial_BwC: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y_t = act(bias + sum over m < w of weight[:, w - 1 - m] * x_{t - m}), channel by channel.

    Args:
        x_BSC: fp32, bf16 or fp16; here ``C`` counts channels.
        weight_Cw: w of 2, 3, 4 taps per channel, the last for the token itself.
        bias_C: added before the activation.
        document_ids_BS: no tap reads across a change of document.
        initial_BwC: the w - 1 tokens before the row, (B, w - 1, C), which belong to the document of
            its first token. Zeros when None.
        activation: None or "silu".

    Returns (B, S, C) in the dtype of x. Gradients flow to x, weight, bias and initial.

    Raises:
        ValueError: shapes, widths or an activation that do not fit.
        KernelsUnavailableError: no Triton, or no CUDA device and no interpreter.
    """
    check_conv(x_BSC, weight_Cw, bias_C, document_ids_BS, initial_BwC)
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    tuned = settings("causal_conv", ANY_WIDTH, x_BSC.device)
    module = _kernels("conv", x_BSC)
    options = module.ConvOptions(
        activation == "silu", tuned["block_tokens"], tuned["block_channels"], tuned["num_warps"]
    )
    optional = _optional(bias_C, initial_BwC, document_ids_BS)
    return module.CausalConv.apply(*_contiguous(x_BSC, weight_Cw), *optional, options)


def forgetting_attention(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSGe: Tensor,
    log_decay_BSG: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """o_i = sum_j p_ij v_j with p the softmax over j <= i of scale q_i . k_j + S_i - S_j.

    Quadratic in S, memory linear in S. Arguments as in ``first_order_scan``, except that H is a
    multiple of G.

    Returns o (B, S, H, e) in the dtype of v. Gradients flow to q, k, v and log decay.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit.
        KernelsUnavailableError: no Triton, or no CUDA device and no interpreter.

    Source: 2Mamba-E (arXiv 2602.17363, section 6); the Forgetting Transformer (arXiv 2503.02130).
    """
    heads = check_scan(q_BSHd, k_BSGd, v_BSGe, log_decay_BSG, document_ids_BS)
    if heads.per_key != 1:
        raise ValueError(f"{heads.num_states} value heads for {heads.num_keys} key heads")
    tuned = settings("forgetting_attention", max(q_BSHd.shape[3], v_BSGe.shape[3]), q_BSHd.device)
    module = _kernels("forgetting", q_BSHd)
    options = module.AttentionOptions(
        heads, scale, matmul_precision(precision, q_BSHd, k_BSGd, v_BSGe), **tuned
    )
    return module.ForgettingAttention.apply(
        *_contiguous(q_BSHd, k_BSGd, v_BSGe, clamp_log_decay(log_decay_BSG)),
        *_optional(document_ids_BS),
        options,
    )


def second_order_scan(
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    normalize: bool = True,
    return_final_state: bool = True,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_i = sum_j w_ij v_j / sum_j w_ij with w_ij = (scale q_i . k_j)^2 exp(S_i - S_j).

    As a recurrence: state_t = exp(A_t) state_{t-1} + phi(scale k_t) (x) [v_t, 1] and
    o_t = phi(q_t) state_t, its columns for v over its last. phi of a head of width d is the upper
    triangle of x (x) x row by row, D = d (d + 1) / 2 features, x_i^2 on and sqrt(2) x_i x_j off the
    diagonal.

    Args (else as in ``first_order_scan``):
        initial_state: (B, V, D, e + 1), or (B, V, D, e) without normalisation; its keys carry
            the scale.
        chunk_size: positions per chunk, rounded up to whole tiles. When None the tuning table
            decides: the whole row, which is quadratic attention, up to a length, chunks beyond.
        normalize: divide by the sum of weights. A row whose weights sum to less than 1e-30 gives 0.
        return_final_state: False returns None for it and, on short rows, saves making it.

    Returns:
        o (B, S, max(H, V), e) in the dtype of v, and the state after the last token in fp32, laid
        out as ``initial_state``. Gradients flow as in ``first_order_scan``.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit.
        KernelsUnavailableError: no Triton, or no CUDA device and no interpreter.

    Source: 2Mamba (arXiv 2602.17363, sections 3 and 4 and appendix A). Its printed gradient applies
    the decay to one of two terms; the one here was checked against autograd.
    """
    heads = check_scan(q_BSHd, k_BSGd, v_BSVe, log_decay_BSV, document_ids_BS)
    d, num_tokens = q_BSHd.shape[3], q_BSHd.shape[1]
    width = v_BSVe.shape[3] + int(normalize)
    check_state(initial_state, (v_BSVe.shape[0], heads.num_states, d * (d + 1) // 2, width))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is not positive")
    tuned = settings("second_order", max(d, v_BSVe.shape[3]), q_BSHd.device)
    if chunk_size is None:
        chunk_size = num_tokens if num_tokens <= tuned["quadratic_below"] else tuned["chunk"]
    module = _kernels("second_order", q_BSHd)
    options = module.SecondOrderOptions(
        heads, scale, _whole_tiles(chunk_size, tuned["block"]), normalize, return_final_state,
        matmul_precision(precision, q_BSHd, k_BSGd, v_BSVe), *_second_order_sizes(tuned),
    )  # fmt: skip
    tokens = _contiguous(q_BSHd, k_BSGd, v_BSVe, clamp_log_decay(log_decay_BSV))
    return module.SecondOrderScan.apply(
        *tokens, *_optional(_fp32(initial_state), document_ids_BS), options
    )


def second_order_final_state(
    k_BSGd: Tensor,
    v_BSVe: Tensor,
    log_decay_BSV: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
    normalize: bool = True,
    precision: str | None = None,
) -> Tensor:
    """The final state of ``second_order_scan`` from a zero initial state, in the same layout.

    Gradients flow to k, v and log decay.
    """
    heads = check_scan(k_BSGd, k_BSGd, v_BSVe, log_decay_BSV, document_ids_BS)
    tuned = settings("second_order", max(k_BSGd.shape[3], v_BSVe.shape[3]), k_BSGd.device)
    module = _kernels("second_order", k_BSGd)
    options = module.SecondOrderOptions(
        heads, scale, _whole_tiles(k_BSGd.shape[1], tuned["block"]), normalize, True,
        matmul_precision(precision, k_BSGd, v_BSVe), *_second_order_sizes(tuned),
    )  # fmt: skip
    return module.SecondOrderFinalState.apply(
        *_contiguous(k_BSGd, v_BSVe, clamp_log_decay(log_decay_BSV)),
        *_optional(document_ids_BS),
        options,
    )


def _whole_tiles(num_tokens: int, tile: int) -> int:
    return -(-num_tokens // tile) * tile


def _second_order_sizes(tuned: dict[str, int]) -> tuple[int, ...]:
    names = ("block", "feature_block", "state_width", "num_warps", "num_stages")
    return tuple(tuned[name] for name in names)
