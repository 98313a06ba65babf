"""Triton kernels for linear-time sequence mixers, with gradients; see docs/kernels.md.

Nothing here imports ``trinity``. Importing this needs neither Triton nor a GPU; a call does.
"""

from trinity_kernels.api import (
    KernelsUnavailableError,
    causal_conv,
    first_order_final_state,
    first_order_scan,
    forgetting_attention,
    second_order_final_state,
    second_order_scan,
)

__all__ = [
    "KernelsUnavailableError",
    "causal_conv",
    "first_order_final_state",
    "first_order_scan",
    "forgetting_attention",
    "second_order_final_state",
    "second_order_scan",
]
