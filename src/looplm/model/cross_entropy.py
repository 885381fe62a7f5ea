"""Cross-entropy straight from hidden states: head, softcap and loss in chunks of rows, gradients computed on the way.

The logits of one chunk are all that is ever kept, and softmax and tanh are computed once, not once more in the backward
pass (the idea of Liger Kernel, Hsu et al. 2024). Shapes: N rows, D width, V logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 512  # of 4,096 logits: 8 MB in fp32
FEWEST_ROWS = 16  # fewer rows are padded to a power of two: compiled for few sizes
LARGEST_BOUND = 40.0  # exp(-2 * 40) is a number in fp32; a larger softcap needs the row's own maximum
NOT_SCORED = -100  # torch's own mark of a target that is not scored


class LossChunk:
    """For one chunk of rows: the summed loss times `scale`, and its gradient (rows, V) by the raw logits."""

    def __init__(self, *, compiled: bool = False) -> None:
        self.tanh, self.score = _tanh, _score
        if compiled:  # apart, so that the tanh is kept and not computed again in each of the passes over a row
            self.tanh, self.score = torch.compile(_tanh, dynamic=False), torch.compile(_score, dynamic=False)

    def __call__(
        self, raw: Tensor, targets: Tensor, scale: Tensor, *, softcap: float | None, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        shaped = raw if softcap is None else self.tanh(raw, softcap)
        return self.score(shaped, targets, scale, softcap, label_smoothing, raw.dtype)


def _tanh(logits: Tensor, softcap: float) -> Tensor:
    """tanh(logits / softcap) in fp32, by exp: compiled for a CPU, torch 2.13's tanh takes five times as long."""
    return 1 - 2 / ((logits.float() * (2 / softcap)).exp() + 1)


def _score(
    shaped: Tensor,
    targets: Tensor,
    scale: Tensor,
    softcap: float | None,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient for logits, or with a softcap for their tanh."""
    logits = shaped.float() if softcap is None else softcap * shaped
    # the maximum of bounded logits need not be searched
    top = softcap if softcap is not None and softcap <= LARGEST_BOUND else logits.amax(-1, keepdim=True)
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
        chunk: LossChunk,
    ) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        n_rows = len(hidden)
        step = min(CHUNK_ROWS, max(FEWEST_ROWS, 1 << (n_rows - 1).bit_length()))
        padding = -n_rows % step
        rows, kept = F.pad(hidden.to(dtype), (0, 0, 0, padding)), weight.to(dtype)
        scale = 1 / (targets != NOT_SCORED).sum().float()
        targets = F.pad(targets, (0, padding), value=NOT_SCORED)
        loss = torch.zeros((), device=hidden.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                value, gradient = chunk(
                    rows[part] @ kept.T, targets[part], scale, softcap=softcap, label_smoothing=label_smoothing
                )
                loss += value
                torch.mm(gradient, kept, out=grad_rows[part])
                grad_weight += gradient.T @ rows[part]
        ctx.save_for_backward(grad_rows[:n_rows].to(hidden.dtype), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
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
    chunk: LossChunk,
) -> Tensor:
    """Mean cross-entropy, nats, of the targets (N,) that are not -100, given hidden states (N, D) and the head's weight
    (V, D); NaN if there are none."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _FromHidden.apply(hidden, weight, targets, softcap, label_smoothing, chunk)
        return loss
    logits = F.linear(hidden, weight).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
