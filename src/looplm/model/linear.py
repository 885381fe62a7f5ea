"""Bias-free linear maps: one full matrix, a product of two thin ones, or a matrix with a thin product beside it."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from looplm.config import Config, Scale, Size


class FullConfig(Config):
    """One d_in x d_out matrix."""

    kind: Literal["full"] = "full"


class LowRankConfig(Config):
    """A product of d_in x rank and rank x d_out, as NRM uses for every projection."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Size
    """Inner width of the product."""


class HRAConfig(Config):
    """A full matrix and a low-rank product added to it, as Nano-OSRT fine-tunes with."""

    kind: Literal["hra"] = "hra"
    rank: Size
    """Inner width of the product."""
    scale: Scale = 1.0
    """Factor of the product."""


LinearConfig = Annotated[FullConfig | LowRankConfig | HRAConfig, Field(discriminator="kind")]


# Rows at which, in fp32 on a CPU, W x^T with W by row takes less time than x W^T with W by column (docs/log.md)
MANY_ROWS, MOST_ROWS = 12, 64


class Linear(nn.Linear):
    """y = x W^T for x (..., d_in), with no bias."""

    for_many_rows = False
    """Whether a forward without gradient computes W x^T for some dozens of rows."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.for_many_rows and not torch.is_grad_enabled():
            rows = x.flatten(0, -2)
            if MANY_ROWS <= len(rows) <= MOST_ROWS:
                return (self.weight @ rows.t()).t().unflatten(0, x.shape[:-1])
        return super().forward(x)


class LowRankLinear(nn.Module):
    """y = up(down(x)), with no bias and nothing in between: rank * (d_in + d_out) parameters."""

    def __init__(self, d_in: int, d_out: int, *, rank: int) -> None:
        super().__init__()
        self.down = Linear(d_in, rank)
        self.up = Linear(rank, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class HRALinear(nn.Module):
    """y = base(x) + scale * (x a) b, with b zero at first."""

    def __init__(self, d_in: int, d_out: int, *, config: HRAConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.base = Linear(d_in, d_out)
        self.a = nn.Parameter(torch.empty(d_in, config.rank))
        self.b = nn.Parameter(torch.empty(config.rank, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * ((x @ self.a) @ self.b)


def make_linear(config: FullConfig | LowRankConfig | HRAConfig, d_in: int, d_out: int) -> nn.Module:
    """The linear map that `config` names, from (..., d_in) to (..., d_out)."""
    if isinstance(config, LowRankConfig):
        return LowRankLinear(d_in, d_out, rank=config.rank)
    if isinstance(config, HRAConfig):
        return HRALinear(d_in, d_out, config=config)
    return Linear(d_in, d_out)


def together(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """The results of several linear maps of x, by one product where `join_weights` has put their weights side by
    side."""
    joined = getattr(maps[0], "joined", None)
    if joined is None or torch.is_grad_enabled():  # through `joined` the weights would get no gradient
        return tuple(part(x) for part in maps)
    return (x @ joined).split([part.out_features for part in maps if isinstance(part, nn.Linear)], dim=-1)


def join_weights(*maps: nn.Module) -> None:
    """Lay out the weights of linear maps of one input for products of few rows: by column, side by side. Their values
    and the names they are saved under stay, and `together` sees what is loaded into them in place."""
    linears = [part for part in maps if isinstance(part, nn.Linear)]
    if len(linears) < len(maps):
        return  # a low-rank pair has another product in between
    joined = torch.cat([part.weight.data.t() for part in linears], dim=1)
    start = 0
    for part in linears:
        part.weight.data = joined[:, start : start + part.out_features].t()
        start += part.out_features
    if len(linears) > 1:
        linears[0].joined = joined
