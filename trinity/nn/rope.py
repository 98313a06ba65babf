"""Tables of rotary positions in the rotate-half (NeoX) layout, over all channels of a head.

:func:`trinity.ops.elementwise.rotary` applies them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device | str, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions ``start .. start + num_positions - 1``.

    Returns two fp32 tensors of shape (positions, head_dim), the frequencies laid out twice.
    Angles are formed in fp32 like every published checkpoint's were.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    positions = torch.arange(start, start + num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
