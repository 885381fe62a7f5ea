"""Lion (Chen et al. 2023): the sign of an interpolation between gradient and momentum. One number of state a parameter,
and every number moves by the same amount: rates are three to ten times lower than AdamW's, decays as much higher."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from looplm.dist import local
from looplm.optim.buffers import buffer


class Lion(Optimizer):
    """p <- (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moving:
                continue
            parameters: list[Tensor] = [local(parameter) for parameter in moving]
            gradients = [local(parameter.grad) for parameter in moving]
            momenta = [local(buffer(self.state[p], "momentum_buffer", p)) for p in moving]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
