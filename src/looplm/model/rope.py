"""Rotary position embedding (Su et al. 2021) with both pairings of channels and NTK-aware scaling.

Tables are plain tensors passed to every block, not state of the attention layer, so that a forward at any positions
needs no buffer to be long enough.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from looplm.config import MOST_SCALE, Config, Number

# half: channel i turns with channel i + K/2 (GPT-NeoX); interleaved: channel 2i with 2i + 1 (the paper, OpenMythos)
Pairing = Literal["half", "interleaved"]

MOST_FACTOR = 1e6


class RopeConfig(Config):
    """Rotary position embedding."""

    base: Number = Field(default=10000.0, ge=1, le=MOST_SCALE)
    """Base wavelength in tokens."""
    pairing: Pairing = "half"
    """Which channels turn together."""
    ntk_factor: Number = Field(default=1.0, ge=1, le=MOST_FACTOR)
    """Context length over the trained one, for NTK-aware scaling."""


def check_turning(config: RopeConfig, width: int, *, name: str) -> None:
    """Refuse to scale the angles of one pair alone: NTK-aware scaling keeps the fastest and slows the slowest.

    Raises:
        ValueError: there is one pair, and a factor.
    """
    if config.ntk_factor != 1 and width < 4:
        raise ValueError(
            f"{name} {width} is one pair of channels, which ntk_factor {config.ntk_factor:g} cannot both keep and "
            f"slow: set rope.ntk_factor to 1 or {name} to 4 or more"
        )


def rope_tables(positions: Tensor, *, head_dim: int, config: RopeConfig) -> tuple[Tensor, Tensor]:
    """cos and sin for integer positions (T,) or (B, T): (1 or B, 1, T, K/2) each in fp32, ready for `apply_rope`.

    An ntk_factor f stretches the base to base * f^(K / (K - 2)): the slowest pair turns f times slower, the fastest
    as before, so that a context f times longer stays within the angles trained on.
    """
    base = config.base
    if config.ntk_factor != 1:
        base = base * config.ntk_factor ** (head_dim / (head_dim - 2))
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * base**-exponent  # (..., T, K/2)
    if angles.dim() == 2:
        angles = angles[None]
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, pairing: Pairing = "half") -> Tensor:
    """Turn x (B, H, T, K) by its positions; computed in fp32, returned in x's type.

    Written with `stack`: the form with chunk and cat gives NaN gradients when torch 2.13 compiles it behind a batched
    product on CPU, and the one with roll takes twice as long (docs/log.md, 2026-11-21).
    """
    axis = -2 if pairing == "half" else -1
    left, right = x.float().unflatten(-1, (2, -1) if pairing == "half" else (-1, 2)).unbind(axis)
    return torch.stack((left * cos - right * sin, right * cos + left * sin), dim=axis).flatten(-2).to(x.dtype)
