"""Rotary position embedding (Su et al. 2021), half-split pairing: channel i turns with channel i + K/2.

Tables are plain tensors passed to every block, not state of the attention layer, so that a forward at any positions
needs no buffer to be long enough.
"""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin for integer positions (T,) or (B, T): (1 or B, 1, T, K/2) each in fp32, ready for `apply_rope`."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * base**-exponent  # (..., T, K/2)
    if angles.dim() == 2:
        angles = angles[None]
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, H, T, K) by its positions; computed in fp32, returned in x's type.

    Written with `stack`: the form with chunk and cat gives NaN gradients when torch 2.13 compiles it behind a batched
    product on CPU, and the one with roll takes twice as long (docs/log.md, 2026-11-21).
    """
    left, right = x.float().unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-2).flatten(-2).to(x.dtype)
