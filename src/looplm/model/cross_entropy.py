"""Cross-entropy straight from hidden states: head, softcap and loss in chunks of rows, gradients computed on the way.

The logits of one chunk are all that is ever kept, and softmax and tanh are computed once, not once more in the backward
pass (the idea of Liger Kernel, Hsu et al. 2024). Shapes: N rows, D width, V logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 512  # of 4,096 logits: 8 MB in fp32
NOT_SCORED = -1

Chunk = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, float], tuple[Tensor, Tensor]]


def make_chunk(*, compiled: bool = False) -> Chunk:
    """The function of one chunk: summed loss times `scale`, and its gradient (rows, V) by the raw logits."""
    tanh_of, scored = _tanh, _scored
    if compiled:  # apart, so that the tanh is kept and not computed again in each of the passes over a row
        tanh_of, scored = torch.compile(_tanh, dynamic=False), torch.compile(_scored, dynamic=False)

    def chunk(
        hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        raw = hidden @ weight.T
        shaped = raw if softcap is None else tanh_of(raw, softcap)
        return scored(shaped, targets, scale, softcap, label_smoothing, hidden.dtype)

    return chunk


def _tanh(logits: Tensor, softcap: float) -> Tensor:
    """tanh(logits / softcap) in fp32, by exp: compiled for a CPU, torch 2.13's tanh takes five times as long."""
    return 1 - 2 / ((logits.float() * (2 / softcap)).exp() + 1)


def _scored(
    shaped: Tensor,
    targets: Tensor,
    scale: Tensor,
    softcap: float | None,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient for logits, or with a softcap for their tanh."""
    top: Tensor | float
    if softcap is None:
        logits = shaped.float()
        top = logits.amax(-1, keepdim=True)
    else:
        logits, top = softcap * shaped, softcap  # bounded: no maximum to look for
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    index = targets.clamp(min=0)[:, None]
    loss = (total.log() + top - (1 - label_smoothing) * logits.gather(1, index)).squeeze(-1)
    row_scale = torch.where(targets != NOT_SCORED, scale, 0.0)[:, None]
    gradient = weights * (row_scale / total)
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
        gradient = gradient - row_scale * (label_smoothing / logits.shape[1])
    is_target = index == torch.arange(logits.shape[1], device=targets.device)
    gradient = torch.where(is_target, gradient - row_scale * (1 - label_smoothing), gradient)
    if softcap is not None:
        gradient = gradient * (1 - shaped.square())
    return (loss * row_scale.squeeze(-1)).sum(), gradient.to(dtype)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        label_smoothing: float,
        chunk: Chunk,
    ) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        n_rows = len(hidden)
        padding = -n_rows % min(CHUNK_ROWS, n_rows)  # chunks of one size: compiled once
        rows, kept = F.pad(hidden.to(dtype), (0, 0, 0, padding)), weight.to(dtype)
        targets = F.pad(targets, (0, padding), value=NOT_SCORED)
        scale = torch.tensor(1 / n_rows, device=hidden.device)
        loss = torch.zeros((), device=hidden.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight)
        step = min(CHUNK_ROWS, n_rows)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                value, gradient = chunk(rows[part], kept, targets[part], scale, softcap, label_smoothing)
                loss += value
                torch.mm(gradient, kept, out=grad_rows[part])
                grad_weight += gradient.T @ rows[part]
        ctx.save_for_backward(grad_rows[:n_rows].to(hidden.dtype), grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None, None, None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk: Chunk,
) -> Tensor:
    """Mean cross-entropy, nats, of targets (N,) given hidden states (N, D) and the head's weight (V, D)."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _FromHidden.apply(hidden, weight, targets, softcap, label_smoothing, chunk)
        return loss
    logits = F.linear(hidden, weight).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
