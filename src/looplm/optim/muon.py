"""Muon (Jordan et al. 2024): momentum, made orthogonal by a Newton-Schulz iteration, all matrices of a shape at once.

torch.optim.Muon takes the same steps one matrix at a time; stacked, a small model's step costs a fraction of that
(docs/log.md, 2026-11-21). A test holds the two together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Quintic coefficients of the iteration: singular values between 0 and 1 end near 1 after five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5


class Muon(Optimizer):
    """Matrices (R, C) and stacks of them (N, R, C) only. An update has size lr * sqrt(max(1, rows / columns)) in every
    direction; Nesterov momentum. `dtype` is what the iteration computes in."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (*_, n_rows, n_columns), parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
                rate = group["lr"] * max(1.0, n_rows / n_columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                orthogonal = orthogonalize(updates.view(-1, n_rows, n_columns), dtype=self.dtype)
                torch._foreach_add_(parameters, list(orthogonal.view(updates.shape).unbind()), alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factors of matrices (N, R, C), nearly: singular values 0.7 to 1.2. Computed in `dtype`, returned
    in the type of the matrices."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(N_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
