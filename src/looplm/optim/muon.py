"""Muon (Jordan et al. 2024): momentum, made orthogonal by a Newton-Schulz iteration, all matrices of a shape at once.

torch.optim.Muon takes the same steps one matrix at a time; stacked, a small model's step costs a fraction of that
(docs/log.md, 2026-11-21). A test holds the two together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from looplm.dist import gathered, local, part_of
from looplm.optim.buffers import buffer

# Quintic coefficients of the iteration: singular values between 0 and 1 end near 1 after five steps.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# The best polynomial of each step for what the one before leaves (Polar Express, arXiv 2505.16932), five steps, with
# room for rounding: as nanochat has them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MAX_SHAPES = 64  # shapes that are compiled; further ones run uncompiled
SECOND_MOMENTUM = "second_momentum_buffer"  # of NorMuon, in an optimizer's state
Coefficients = Sequence[tuple[float, float, float]]


class Muon(Optimizer):
    """Matrices (R, C) and stacks of them (N, R, C) only. An update has size lr * sqrt(max(1, rows / columns)) in every
    direction; Nesterov momentum. `dtype` is the type of the iteration; `compiled` compiles it, once per shape,
    which gains nothing on a CPU, where products take all of its time (docs/log.md, 2026-11-25).

    With `beta2` it is NorMuon (arXiv 2510.05491) as nanochat has it: rows are brought to one size before the iteration,
    the orthogonal update is divided by the root of a running mean of its squares, one for each row of a tall matrix or
    each column of a wide one, and made as large as it was; and a weight decays only where the update moves it towards
    zero too.

    Momenta of sharded parameters (FSDP2) are sharded too. Updates are gathered, and every rank makes all of them
    orthogonal, with the same result.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2})
        self.dtype, self.orthogonalize = dtype, orthogonalize
        if compiled:
            self.orthogonalize = torch.compile(  # type: ignore[call-overload]
                orthogonalize, dynamic=False, recompile_limit=MAX_SHAPES
            )
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
                gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
                momenta = [local(buffer(self.state[p], "momentum_buffer", p)) for p in parameters]
                # the momentum is a running mean of gradients; the update looks one step ahead (Nesterov)
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                parts = zip(torch._foreach_lerp(gradients, momenta, group["momentum"]), parameters, strict=True)
                # a matrix is made orthogonal whole: of sharded parameters, every rank gathers the parts
                updates = torch.stack([gathered(part, like=parameter) for part, parameter in parts])
                rate = group["lr"] * max(1.0, n_rows / n_columns) ** 0.5
                if group["beta2"] is not None:
                    self._normalised(parameters, updates, rate=rate, group=group)
                    continue
                orthogonal = self.orthogonalize(updates.view(-1, n_rows, n_columns), dtype=self.dtype)
                own = zip(orthogonal.view(updates.shape).unbind(), parameters, strict=True)
                weights = [local(parameter) for parameter in parameters]
                # decoupled weight decay, as in AdamW
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, [part_of(each, like=parameter) for each, parameter in own], alpha=-rate)

    def _normalised(self, parameters: list[Tensor], updates: Tensor, *, rate: float, group: dict[str, Any]) -> None:
        """NorMuon's step for parameters of one shape, `updates` (K, ..., R, C)."""
        n_rows, n_columns = updates.shape[-2:]
        # every row as large as the others, the whole as large as before
        row_sizes = updates.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        alike = updates * (updates.norm(dim=(-2, -1), keepdim=True) / n_rows**0.5 / row_sizes)
        flat = alike.view(-1, n_rows, n_columns)
        x = self.orthogonalize(flat, dtype=self.dtype, coefficients=POLAR_EXPRESS).view(updates.shape)
        # the Frobenius norm of an orthogonal matrix of this shape; the iteration only comes near to it
        size = min(n_rows, n_columns) ** 0.5
        x = x * (size / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))
        # one number a row of a tall matrix, a column of a wide one: (K, ..., R, 1) or (K, ..., 1, C)
        squares = x.square().mean(dim=-1 if n_rows >= n_columns else -2, keepdim=True)
        each = zip(parameters, squares.unbind(), strict=True)
        seconds = [buffer(self.state[p], SECOND_MOMENTUM, like) for p, like in each]  # whole on every rank
        torch._foreach_lerp_(seconds, list(squares.unbind()), 1 - group["beta2"])
        x = x * torch.stack(seconds).clamp(min=1e-10).rsqrt()
        x = x * (size / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
        for parameter, whole in zip(parameters, x.unbind(), strict=True):
            weight, update = local(parameter), part_of(whole, like=parameter)
            # decay acts only where the update too moves the weight towards zero
            shrinks = update * weight >= 0
            weight.sub_(rate * (update + group["weight_decay"] * weight * shrinks))


def orthogonalize(
    matrices: Tensor, *, dtype: torch.dtype = torch.bfloat16, coefficients: Coefficients = NEWTON_SCHULZ
) -> Tensor:
    """The orthogonal factors of matrices (N, R, C), nearly: singular values 0.7 to 1.2. Computed in `dtype`, returned
    in the type of the matrices."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    # wide, so that x x^T is the smaller of the two Gram matrices
    x = x.mT if is_tall else x
    # Polar Express diverges above 1, where rounding can take a singular value
    room = 1.01 if coefficients == POLAR_EXPRESS else 1.0
    x = x / (room * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
