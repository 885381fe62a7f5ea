"""Bias-free linear maps: one full matrix, or a product of two thin ones."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from looplm.config import Config


class FullConfig(Config):
    """One d_in x d_out matrix."""

    kind: Literal["full"] = "full"


class LowRankConfig(Config):
    """A product of d_in x rank and rank x d_out, as NRM uses for every projection."""

    kind: Literal["low_rank"] = "low_rank"
    rank: PositiveInt
    """Inner width of the product."""


LinearConfig = Annotated[FullConfig | LowRankConfig, Field(discriminator="kind")]


class LowRankLinear(nn.Module):
    """y = up(down(x)), with no bias and nothing in between: rank * (d_in + d_out) parameters."""

    def __init__(self, d_in: int, d_out: int, *, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def make_linear(config: FullConfig | LowRankConfig, d_in: int, d_out: int) -> nn.Module:
    """The linear map that `config` names, from (..., d_in) to (..., d_out)."""
    if isinstance(config, LowRankConfig):
        return LowRankLinear(d_in, d_out, rank=config.rank)
    return nn.Linear(d_in, d_out, bias=False)
