"""Feed-forward parts: SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021), experts (moe.py), SwiGLU beside experts.

Every part maps (B, T, D) to (B, T, D) and takes the layer's shared inputs, which only a loop-aware router reads.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from looplm.config import MOST_SCALE, Config, Number, Size
from looplm.model.layer_inputs import LayerInputs
from looplm.model.linear import LinearConfig, join_weights, make_linear
from looplm.model.moe import MoE, MoEConfig
from looplm.model.norm import RMSNorm
from looplm.model.swiglu import SwiGLU


class SwiGLUConfig(Config):
    """down(silu(gate(x)) * up(x)): three matrices."""

    kind: Literal["swiglu"] = "swiglu"
    d_ff: Size
    """Inner width."""


class ReLU2Config(Config):
    """down(relu(up(x))^2): two matrices."""

    kind: Literal["relu2"] = "relu2"
    d_ff: Size
    """Inner width."""


class ParallelConfig(Config):
    """dense_gate * swiglu(norm(x)) + moe_gate * moe(norm(x)), each branch with its own norm and scalar."""

    kind: Literal["parallel"] = "parallel"
    d_ff: Size
    """Inner width of the dense branch."""
    moe: MoEConfig
    """The other branch."""
    gate_init: Number = Field(default=0.5, ge=-MOST_SCALE, le=MOST_SCALE)
    """Initial value of both scalars."""


FFNConfig = Annotated[SwiGLUConfig | ReLU2Config | MoEConfig | ParallelConfig, Field(discriminator="kind")]


class ReLU2(nn.Module):
    """Squared-ReLU feed-forward."""

    def __init__(self, d_model: int, d_ff: int, linear: LinearConfig) -> None:
        super().__init__()
        self.up = make_linear(linear, d_model, d_ff)
        self.down = make_linear(linear, d_ff, d_model)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self.down(F.relu(self.up(x)).square())

    def lay_out(self) -> None:
        """Weights by column."""
        join_weights(self.up)
        join_weights(self.down)


class Parallel(nn.Module):
    """Dense and experts side by side; takes the stream itself, not its norm."""

    def __init__(
        self,
        d_model: int,
        config: ParallelConfig,
        linear: LinearConfig,
        *,
        layer_idx: int,
        norm_eps: float,
        norm_weight: bool,
    ) -> None:
        super().__init__()
        self.dense_norm = RMSNorm(d_model, eps=norm_eps, has_weight=norm_weight)
        self.dense = SwiGLU(d_model, config.d_ff, linear)
        self.moe_norm = RMSNorm(d_model, eps=norm_eps, has_weight=norm_weight)
        self.moe = MoE(d_model, config.moe, linear, layer_idx=layer_idx)
        self.gate_init = config.gate_init
        self.dense_gate = nn.Parameter(torch.empty(1))  # one entry: FSDP takes no 0-d parameter
        self.moe_gate = nn.Parameter(torch.empty(1))
        self.reset()

    def reset(self) -> None:
        """Both branches alike."""
        for gate in (self.dense_gate, self.moe_gate):
            nn.init.constant_(gate, self.gate_init)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        dense = self.dense(self.dense_norm(x), inputs)
        return self.dense_gate[0] * dense + self.moe_gate[0] * self.moe(self.moe_norm(x), inputs)


def make_ffn(
    d_model: int, config: FFNConfig, linear: LinearConfig, *, layer_idx: int, norm_eps: float, norm_weight: bool
) -> tuple[nn.Module, nn.Module]:
    """(norm, part): the feed-forward that `config` names, and the norm before it."""
    if isinstance(config, ParallelConfig):
        part = Parallel(d_model, config, linear, layer_idx=layer_idx, norm_eps=norm_eps, norm_weight=norm_weight)
        return nn.Identity(), part
    norm = RMSNorm(d_model, eps=norm_eps, has_weight=norm_weight)
    if isinstance(config, MoEConfig):
        return norm, MoE(d_model, config, linear, layer_idx=layer_idx)
    dense = SwiGLU if isinstance(config, SwiGLUConfig) else ReLU2
    return norm, dense(d_model, config.d_ff, linear)
