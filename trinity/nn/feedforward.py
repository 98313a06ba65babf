"""SwiGLU feed-forwards: one dense matrix triple, or a stack of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trinity.ops.elementwise import swiglu
from trinity.ops.grouped_mm import expert_ffn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GroupedExperts(nn.Module):
    """All routed experts of a layer as two stacked parameters.

    ``gate_up`` (E, 2, F, D) holds the gate matrix at index 0 and the up matrix at 1, so that one
    product per expert serves both while an optimizer still sees two matrices.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.backend = "auto"

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sum over each token's chosen experts, (T, D)."""
        return expert_ffn(x_TD, self.gate_up, self.down, index_TK, weight_TK, backend=self.backend)
