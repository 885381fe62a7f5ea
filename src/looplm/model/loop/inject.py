"""How the prelude's output e enters the state at every loop.

One class per kind, each with the same methods: `prepare` runs once per forward; `enter` gives the core layers their
input at the start of every loop (state is None at the first), `leave` makes the next state of what they return;
`read_out` runs once after the last loop.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from looplm.config import MOST_SCALE, Config, Number, PositiveFloat, Scale
from looplm.model.norm import RMSNorm

# exp(-x) rounds to 1 in fp32 below 6e-8; this floor keeps the decay representably below 1 whatever is learned.
MIN_DECAY_RATE = 1e-6
MAX_DECAY_RATE = 16.0  # a decay of 1e-7, lost in any fp32 sum; exp(-x) is exactly 0 above 103


class NoInjectConfig(Config):
    """The state alone: a plain stack of layers, repeated."""

    kind: Literal["none"] = "none"


class AddInjectConfig(Config):
    """state + e."""

    kind: Literal["add"] = "add"


class GateInjectConfig(Config):
    """g * state + (1 - g) * e with one learned scalar, g = sigmoid(gate): NRM's think gate."""

    kind: Literal["gate"] = "gate"
    init: Number = Field(default=0.5, ge=-MOST_SCALE, le=MOST_SCALE)
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


class LTIInjectConfig(Config):
    """decay * state + gain * e + core(norm(state + e + loop embedding)): OpenMythos's time-invariant injection."""

    kind: Literal["lti"] = "lti"
    loop_embed: Literal["none", "raw", "scaled"] = "scaled"
    """Sine and cosine of the loop's number on the first eighth of the channels: raw, as OpenMythos adds it, of size 1;
    scaled to loop_embed_size times the size of what it is added to."""
    loop_embed_size: Scale = 0.1
    """Size of a scaled loop embedding, relative."""
    bounded_decay: bool = True
    """Keep the decay below 1 in fp32 too; OpenMythos's reaches 1 and 0."""


InjectConfig = Annotated[
    NoInjectConfig | AddInjectConfig | GateInjectConfig | DiagonalInjectConfig | LTIInjectConfig,
    Field(discriminator="kind"),
]


class NoInject(nn.Module):
    """e enters once, as the first state."""

    def prepare(self, entry: Tensor) -> Tensor:
        return entry

    def enter(self, state: Tensor | None, entry: Tensor, *, loop_idx: Tensor) -> Tensor:
        return entry if state is None else state

    def leave(self, state: Tensor | None, entry: Tensor, out: Tensor) -> Tensor:
        return out

    def read_out(self, state: Tensor) -> Tensor:
        return state


class AddInject(NoInject):
    """e is added before every loop after the first."""

    def enter(self, state: Tensor | None, entry: Tensor, *, loop_idx: Tensor) -> Tensor:
        return entry if state is None else state + entry


class GateInject(NoInject):
    """State and e mixed by one learned scalar. With one loop the gate is unused and gets no gradient."""

    def __init__(self, config: GateInjectConfig) -> None:
        super().__init__()
        self.init = config.init
        self.think_gate = nn.Parameter(torch.full((1,), config.init))

    def reset(self) -> None:
        """The config's initial value."""
        nn.init.constant_(self.think_gate, self.init)

    def enter(self, state: Tensor | None, entry: Tensor, *, loop_idx: Tensor) -> Tensor:
        if state is None:
            return entry
        gate = self.think_gate[0].sigmoid()
        return gate * state + (1 - gate) * entry


class DiagonalInject(NoInject):
    """h <- decay * h + dt * (B norm(e)), decay = exp(-softplus(dt_bias) * exp(A_log)), below 1 by construction.

    Source: Parcae. The bound holds for this linear part; the layers that follow are not linear.
    """

    def __init__(self, d_model: int, config: DiagonalInjectConfig, *, norm_eps: float) -> None:
        super().__init__()
        self.rate_init = -math.log(config.decay_init)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.A_log = nn.Parameter(torch.empty(d_model))
        self.dt_bias = nn.Parameter(torch.empty(d_model))
        self.B = nn.Linear(d_model, d_model, bias=False) if config.input_map else nn.Identity()
        self.C = nn.Linear(d_model, d_model, bias=False) if config.output_map else nn.Identity()
        self.reset()

    def reset(self) -> None:
        """The config's decay in every channel; B and C are set by `init_weights`, which draws all linears first."""
        nn.init.zeros_(self.A_log)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(self.rate_init)))  # softplus^-1(rate)

    def decay(self) -> Tensor:
        """Decay per channel (D,), in fp32."""
        rate = F.softplus(self.dt_bias.float()) * self.A_log.float().exp()
        return torch.exp(-rate.clamp(min=MIN_DECAY_RATE))

    def prepare(self, entry: Tensor) -> Tensor:
        return (F.softplus(self.dt_bias.float()) * self.B(self.norm(entry))).to(entry.dtype)

    def enter(self, state: Tensor | None, entry: Tensor, *, loop_idx: Tensor) -> Tensor:
        return entry if state is None else (self.decay() * state).to(entry.dtype) + entry

    def read_out(self, state: Tensor) -> Tensor:
        return self.C(state)


class LTIInject(NoInject):
    """h <- decay * h + gain * e + core(norm(h + e + loop embedding)), h = e before the first loop."""

    def __init__(self, d_model: int, config: LTIInjectConfig, *, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.log_A = nn.Parameter(torch.empty(d_model))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.gain = nn.Parameter(torch.empty(d_model))
        self.reset()

    def reset(self) -> None:
        """Decay exp(-1), gain 0.1."""
        nn.init.zeros_(self.log_A)
        nn.init.zeros_(self.log_dt)
        nn.init.constant_(self.gain, 0.1)

    def decay(self) -> Tensor:
        """Decay per channel (D,), in fp32."""
        rate = (self.log_dt.float() + self.log_A.float()).clamp(-20, 20).exp()
        return torch.exp(-rate.clamp(MIN_DECAY_RATE, MAX_DECAY_RATE) if self.config.bounded_decay else -rate)

    def enter(self, state: Tensor | None, entry: Tensor, *, loop_idx: Tensor) -> Tensor:
        x = (entry if state is None else state) + entry
        if self.config.loop_embed != "none":
            embed = loop_embedding(loop_idx, d_model=x.shape[-1], device=x.device)
            if self.config.loop_embed == "scaled":
                embed = embed * self.config.loop_embed_size * x.detach().float().square().mean(-1, keepdim=True).sqrt()
            x = x + embed.to(x.dtype)
        return self.norm(x)

    def leave(self, state: Tensor | None, entry: Tensor, out: Tensor) -> Tensor:
        state = entry if state is None else state
        return (self.decay() * state + self.gain * entry).to(out.dtype) + out


def loop_embedding(loop_idx: Tensor, *, d_model: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of the loop's number on the first d_model // 8 channels, zero on the others (D,)."""
    n_channels = d_model // 8
    frequency = 10000.0 ** -(torch.arange(0, n_channels, 2, device=device, dtype=torch.float32) / n_channels)
    waves = torch.cat(((loop_idx * frequency).sin(), (loop_idx * frequency).cos()))[:n_channels]
    return F.pad(waves, (0, d_model - n_channels))


def make_inject(d_model: int, config: InjectConfig, *, norm_eps: float) -> NoInject:
    """The injection that `config` names."""
    if isinstance(config, LTIInjectConfig):
        return LTIInject(d_model, config, norm_eps=norm_eps)
    if isinstance(config, DiagonalInjectConfig):
        return DiagonalInject(d_model, config, norm_eps=norm_eps)
    if isinstance(config, GateInjectConfig):
        return GateInject(config)
    return AddInject() if isinstance(config, AddInjectConfig) else NoInject()
