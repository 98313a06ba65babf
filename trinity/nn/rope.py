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
    frequencies = _frequencies(head_dim // 2, theta, device)
    positions = torch.arange(start, start + num_positions, dtype=torch.float32, device=device)
    return _twice(torch.outer(positions, frequencies))


def image_rope_tables(
    coordinates_BSA: Tensor, head_dim: int, theta: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens that stand at ``coordinates_BSA`` (B, S, A), in base tokens.

    Returns two fp32 tensors of shape (B, S, head_dim), the frequencies laid out twice. The channel
    pairs are divided evenly among the axes, in their order; what is left over goes to the first
    axis: frames of videos, rows of images. An axis of n pairs has the frequencies theta^(-i/n) for
    i < n, as a head of 2n channels with one position has. So the product of a rotated query with a
    rotated key depends only on the difference of their coordinates along each axis, whole or not.
    """
    num_axes = coordinates_BSA.shape[-1]
    pairs, left_over = divmod(head_dim // 2, num_axes)
    angles = [
        coordinates_BS1.float()
        * _frequencies(pairs + (left_over if axis == 0 else 0), theta, coordinates_BS1.device)
        for axis, coordinates_BS1 in enumerate(coordinates_BSA.split(1, dim=-1))
    ]
    return _twice(torch.cat(angles, dim=-1))


def _frequencies(num_pairs: int, theta: float, device: torch.device | str) -> Tensor:
    """theta^(-i / num_pairs) for every channel pair i, fp32."""
    exponents = torch.arange(0, 2 * num_pairs, 2, dtype=torch.float32, device=device)
    return 1.0 / theta ** (exponents / (2 * num_pairs))


def _twice(angles: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
