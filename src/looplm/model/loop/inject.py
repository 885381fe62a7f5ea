"""How the prelude's output e enters the state at every loop.

One class per kind, each with the same three methods: `prepare` runs once per forward, `forward` at the start of every
loop (state is None at the first), `read_out` once after the last.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from looplm.config import Config
from looplm.model.norm import RMSNorm

# exp(-x) rounds to 1 in fp32 below 6e-8; this floor keeps the decay representably below 1 whatever is learned.
MIN_DECAY_RATE = 1e-6


class NoInjectConfig(Config):
    """The state alone: a plain stack of layers, repeated."""

    kind: Literal["none"] = "none"


class AddInjectConfig(Config):
    """state + e."""

    kind: Literal["add"] = "add"


class GateInjectConfig(Config):
    """g * state + (1 - g) * e with one learned scalar, g = sigmoid(gate): NRM's think gate."""

    kind: Literal["gate"] = "gate"
    init: float = 0.5
    """Initial value of the scalar before the sigmoid."""


class DiagonalInjectConfig(Config):
    """decay * state + dt * B norm(e) with a learned decay per channel in (0, 1): Parcae's constrained injection."""

    kind: Literal["diagonal"] = "diagonal"
    decay_init: PositiveFloat = Field(default=math.sqrt(1 / 5), lt=1)
    """Decay of every channel at initialisation."""
    input_map: bool = True
    """Learn B (initially the identity); false uses the identity."""
    output_map: bool = False
    """Learn C (initially the identity), applied to the state after the last loop."""


InjectConfig = Annotated[
    NoInjectConfig | AddInjectConfig | GateInjectConfig | DiagonalInjectConfig, Field(discriminator="kind")
]


class NoInject(nn.Module):
    """e enters once, as the first state."""

    def prepare(self, entry: Tensor) -> Tensor:
        return entry

    def forward(self, state: Tensor | None, entry: Tensor) -> Tensor:
        return entry if state is None else state

    def read_out(self, state: Tensor) -> Tensor:
        return state


class AddInject(NoInject):
    """e is added before every loop after the first."""

    def forward(self, state: Tensor | None, entry: Tensor) -> Tensor:
        return entry if state is None else state + entry


class GateInject(NoInject):
    """State and e mixed by one learned scalar. With one loop the gate is unused and gets no gradient."""

    def __init__(self, config: GateInjectConfig) -> None:
        super().__init__()
        self.think_gate = nn.Parameter(torch.tensor(config.init))

    def forward(self, state: Tensor | None, entry: Tensor) -> Tensor:
        if state is None:
            return entry
        gate = self.think_gate.sigmoid()
        return gate * state + (1 - gate) * entry


class DiagonalInject(nn.Module):
    """h <- decay * h + dt * (B norm(e)), decay = exp(-softplus(dt_bias) * exp(A_log)), below 1 by construction.

    Source: Parcae. The bound holds for this linear part; the layers that follow are not linear.
    """

    def __init__(self, d_model: int, config: DiagonalInjectConfig, *, norm_eps: float) -> None:
        super().__init__()
        rate = -math.log(config.decay_init)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.A_log = nn.Parameter(torch.zeros(d_model))
        self.dt_bias = nn.Parameter(torch.full((d_model,), math.log(math.expm1(rate))))  # softplus^-1(rate)
        self.B = nn.Linear(d_model, d_model, bias=False) if config.input_map else nn.Identity()
        self.C = nn.Linear(d_model, d_model, bias=False) if config.output_map else nn.Identity()

    def decay(self) -> Tensor:
        """Decay per channel (D,), in fp32."""
        rate = F.softplus(self.dt_bias.float()) * self.A_log.float().exp()
        return torch.exp(-rate.clamp(min=MIN_DECAY_RATE))

    def prepare(self, entry: Tensor) -> Tensor:
        return F.softplus(self.dt_bias.float()) * self.B(self.norm(entry))

    def forward(self, state: Tensor | None, entry: Tensor) -> Tensor:
        return entry if state is None else self.decay() * state + entry

    def read_out(self, state: Tensor) -> Tensor:
        return self.C(state)


Inject = NoInject | DiagonalInject


def make_inject(
    d_model: int,
    config: NoInjectConfig | AddInjectConfig | GateInjectConfig | DiagonalInjectConfig,
    *,
    norm_eps: float,
) -> Inject:
    """The injection that `config` names."""
    if isinstance(config, DiagonalInjectConfig):
        return DiagonalInject(d_model, config, norm_eps=norm_eps)
    if isinstance(config, GateInjectConfig):
        return GateInject(config)
    return AddInject() if isinstance(config, AddInjectConfig) else NoInject()
