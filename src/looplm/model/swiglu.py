"""SwiGLU (Shazeer 2020): the dense feed-forward part, the dense branch beside experts, and every shared expert."""

import torch.nn.functional as F
from torch import Tensor, nn

from looplm.model.layer_inputs import LayerInputs
from looplm.model.linear import LinearConfig, join_weights, make_linear, together


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (..., D) to (..., D)."""

    def __init__(self, d_model: int, d_ff: int, linear: LinearConfig) -> None:
        super().__init__()
        self.gate = make_linear(linear, d_model, d_ff)
        self.up = make_linear(linear, d_model, d_ff)
        self.down = make_linear(linear, d_ff, d_model)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        gate, up = together(x, self.gate, self.up)
        return self.down(F.silu(gate) * up)

    def lay_out(self) -> None:
        """One product for gate and up."""
        join_weights(self.gate, self.up)
        join_weights(self.down)
