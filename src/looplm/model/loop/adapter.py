"""What differs from loop to loop after the core: a low-rank correction with a learned scale per loop (OpenMythos)."""

import torch
from torch import Tensor, nn

from looplm.config import Config, Loops, Scale, Size


class LoopLoRAConfig(Config):
    """x + ((x down) * scale[loop]) b after the core layers."""

    rank: Size
    """Inner width."""
    n_loops: Loops
    """Loops that have a scale; later loops use the last one."""
    max_scale: Scale | None = None
    """Largest magnitude of a scale; null for no bound."""


class LoopLoRA(nn.Module):
    """(B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: LoopLoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Linear(d_model, config.rank, bias=False)
        self.scale = nn.Embedding(config.n_loops, config.rank)
        self.b = nn.Parameter(torch.empty(config.rank, d_model))

    def forward(self, x: Tensor, loop_idx: Tensor) -> Tensor:
        scale = self.scale(loop_idx.clamp(max=self.config.n_loops - 1))
        if self.config.max_scale is not None:
            scale = scale.clamp(-self.config.max_scale, self.config.max_scale)
        return x + (self.down(x) * scale) @ self.b
