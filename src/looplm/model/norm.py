"""RMSNorm (Zhang & Sennrich 2019): no mean, no bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight unless `has_weight` is false, over the last dimension, computed in fp32,
    returned in the input's type."""

    def __init__(self, size: int, *, eps: float = 1e-6, has_weight: bool = True) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size)) if has_weight else None
        self.eps = eps

    def reset(self) -> None:
        """Weights 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), (self.size,), weight, self.eps).to(x.dtype)
