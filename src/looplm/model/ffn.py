"""Feed-forward parts: SwiGLU (Shazeer 2020) and squared ReLU (So et al. 2021)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from looplm.config import Config
from looplm.model.linear import FullConfig, LowRankConfig, make_linear


class SwiGLUConfig(Config):
    """down(silu(gate(x)) * up(x)): three matrices."""

    kind: Literal["swiglu"] = "swiglu"
    d_ff: PositiveInt
    """Inner width."""


class ReLU2Config(Config):
    """down(relu(up(x))^2): two matrices."""

    kind: Literal["relu2"] = "relu2"
    d_ff: PositiveInt
    """Inner width."""


FFNConfig = Annotated[SwiGLUConfig | ReLU2Config, Field(discriminator="kind")]


class SwiGLU(nn.Module):
    """Gated feed-forward, (B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: SwiGLUConfig, linear: FullConfig | LowRankConfig) -> None:
        super().__init__()
        self.gate = make_linear(linear, d_model, config.d_ff)
        self.up = make_linear(linear, d_model, config.d_ff)
        self.down = make_linear(linear, config.d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ReLU2(nn.Module):
    """Squared-ReLU feed-forward, (B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: ReLU2Config, linear: FullConfig | LowRankConfig) -> None:
        super().__init__()
        self.up = make_linear(linear, d_model, config.d_ff)
        self.down = make_linear(linear, config.d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


def make_ffn(d_model: int, config: SwiGLUConfig | ReLU2Config, linear: FullConfig | LowRankConfig) -> nn.Module:
    """The feed-forward part that `config` names."""
    if isinstance(config, SwiGLUConfig):
        return SwiGLU(d_model, config, linear)
    return ReLU2(d_model, config, linear)
