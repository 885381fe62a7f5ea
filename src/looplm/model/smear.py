"""Smear: each token's embedding takes in those of the tokens just before it, a learned weight per channel and distance.

A copying (induction) head has to know the token before; with smear one attention layer can copy, without it takes two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Smear(nn.Module):
    """x[t] + sum over d of weight[d - 1] * x[t - d], d = 1..n_back. Starts as the identity."""

    def __init__(self, d_model: int, *, n_back: int) -> None:
        super().__init__()
        self.n_back = n_back
        self.weight = nn.Parameter(torch.zeros(n_back, d_model))

    def forward(self, x: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """x (B, T, D); `before` (B, n_back, D) are the embeddings just before it, zero where there is none; tokens of
        another of the packed `documents` (B, T) are not taken in."""
        n_tokens = x.shape[1]
        longer = F.pad(x, (0, 0, self.n_back, 0)) if before is None else torch.cat((before, x), dim=1)
        out = x
        for distance in range(1, self.n_back + 1):
            start = self.n_back - distance
            shifted = longer[:, start : start + n_tokens]
            if documents is not None:
                same = F.pad(documents, (distance, 0), value=-1)[:, :n_tokens] == documents
                shifted = shifted * same[..., None]
            out = out + self.weight[distance - 1] * shifted
        return out
