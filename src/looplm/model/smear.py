"""Smear: each token's embedding takes in those of the tokens just before it.

A copying (induction) head has to know the token before; with smear one attention layer can copy, without it takes two.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from looplm.config import Config, Size


class ChannelSmearConfig(Config):
    """A learned weight per channel and distance, zero at first."""

    kind: Literal["channel"] = "channel"
    n_back: Size
    """Tokens back that are taken in."""


class GateSmearConfig(Config):
    """scale * sigmoid(gate(x)) times the token before, one gate for all channels (nanochat)."""

    kind: Literal["gate"] = "gate"
    n_channels: Size = 24
    """Channels of the embedding that the gate reads."""

    @property
    def n_back(self) -> int:
        """Tokens back that are taken in."""
        return 1


SmearConfig = Annotated[ChannelSmearConfig | GateSmearConfig, Field(discriminator="kind")]


class Smear(nn.Module):
    """x[t] + sum over d of weight[d - 1] * x[t - d], d = 1..n_back. Starts as the identity."""

    def __init__(self, d_model: int, config: ChannelSmearConfig) -> None:
        super().__init__()
        self.n_back = config.n_back
        self.weight = nn.Parameter(torch.zeros(config.n_back, d_model))

    def reset(self) -> None:
        """Nothing is taken in."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """x (B, T, D); `before` (B, n_back, D) are the embeddings just before it, zero where there is none. Tokens of
        other documents, packed in the row by `documents` (B, T), are not taken in."""
        out = x
        for distance in range(1, self.n_back + 1):
            shifted = back(x, distance, n_back=self.n_back, before=before, documents=documents)
            out = out + self.weight[distance - 1] * shifted
        return out


class GateSmear(nn.Module):
    """x[t] + scale * sigmoid(gate(x[t, :n_channels])) * x[t - 1]. Starts as the identity."""

    def __init__(self, config: GateSmearConfig) -> None:
        super().__init__()
        self.n_back = config.n_back
        self.n_channels = config.n_channels
        self.gate = nn.Linear(config.n_channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def reset(self) -> None:
        """Nothing is taken in."""
        nn.init.zeros_(self.scale)

    def forward(self, x: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """As `Smear`."""
        shifted = back(x, 1, n_back=1, before=before, documents=documents)
        return x + self.scale * self.gate(x[..., : self.n_channels]).sigmoid() * shifted


def back(x: Tensor, distance: int, *, n_back: int, before: Tensor | None, documents: Tensor | None) -> Tensor:
    """x (B, T, D) as it was `distance` tokens before, zero where there is none or it is of another document."""
    n_tokens = x.shape[1]
    longer = F.pad(x, (0, 0, n_back, 0)) if before is None else torch.cat((before, x), dim=1)
    start = n_back - distance
    shifted = longer[:, start : start + n_tokens]
    if documents is None:
        return shifted
    same = F.pad(documents, (distance, 0), value=-1)[:, :n_tokens] == documents
    return shifted * same[..., None]


def make_smear(d_model: int, config: ChannelSmearConfig | GateSmearConfig) -> Smear | GateSmear:
    """The smear that `config` names."""
    return GateSmear(config) if isinstance(config, GateSmearConfig) else Smear(d_model, config)
