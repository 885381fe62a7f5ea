"""Products of rows with the matrix of the group they are in, forward and backward, and the moves around them.

On a GPU this is `F.grouped_mm`. On a CPU that is a loop over groups, and in bf16 every number of rows that is new costs
milliseconds, because oneDNN writes a kernel for it: groups have new sizes at every step. There the products are in the
weights' own type, and groups of about one size are padded to one batched product (docs/log.md, 2026-11-21).
Shapes: N rows sorted by group, E groups, `ends` (E,) running counts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 3  # groups that are not worth a batch
ROOM = 1.5  # rows a group may have, over the mean, to go with the batch
MULTIPLE = 16  # of rows
WORTH_COPYING = 64  # rows per group at which copying the matrices of a part of the groups costs less than it saves


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (N, d_in) up to ends[e] times weight[e] (E, d_in, d_out): (N, d_out)."""
    if x.device.type != "cpu":
        return grouped_on_gpu(x, weight, ends)
    x = x.to(weight.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        product: Tensor = grouped_on_cpu(x, weight, ends)
        return product
    return _product(x, weight, ends)


def grouped_on_gpu(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped` in autocast's type, by torch's own product."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    product: Tensor = _GroupedOnGPU.apply(x, weight, ends, dtype)
    return product


class _GroupedOnGPU(torch.autograd.Function):
    """`F.grouped_mm` in `dtype` that keeps the weights as they are and casts them once more in the backward pass:
    autocast caches no cast for it, and every loop would keep a copy of all experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.to(dtype), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.to(x.dtype)
        to_x = F.grouped_mm(grad, weight.to(x.dtype).mT, offs=ends)
        to_weight = F.grouped_mm(x.mT, grad, offs=ends)
        return to_x.to(ctx.x_dtype), to_weight.to(weight.dtype), None, None


@torch.library.custom_op("looplm::grouped_on_cpu", mutates_args=())
def grouped_on_cpu(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped` for one type, one opaque step to a compiler."""
    return _product(x, weight, ends)


@torch.library.custom_op("looplm::grouped_outer_on_cpu", mutates_args=())
def grouped_outer_on_cpu(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x_e^T y_e of the rows of every group, (E, d_in, d_out) for x (N, d_in) and y (N, d_out)."""
    singles, batch = _split(ends)
    out = x.new_empty(len(ends), x.shape[1], y.shape[1])
    for group in (ends.diff(prepend=ends.new_zeros(1)) == 0).nonzero().flatten().tolist():
        out[group].zero_()
    with torch.autocast("cpu", enabled=False):
        for group, rows in singles:
            torch.mm(x[rows].mT, y[rows], out=out[group])
        if batch is not None:
            groups, index, is_row = batch
            outer = _rows(x, index).mT @ (_rows(y, index) * is_row[..., None])
            if len(groups) == len(ends):
                return outer
            out[groups] = outer
    return out


@grouped_on_cpu.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer_on_cpu.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return grouped_on_cpu(grad, weight.mT, ends), grouped_outer_on_cpu(x, grad, ends), None


grouped_on_cpu.register_autograd(_backward, setup_context=_save)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    singles, batch = _split(ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    with torch.autocast("cpu", enabled=False):
        for group, rows in singles:
            torch.mm(x[rows], weight[group], out=out[rows])
        if batch is not None:
            groups, index, is_row = batch
            product = _rows(x, index) @ (weight if len(groups) == len(ends) else weight[groups])
            places = is_row.flatten().nonzero().squeeze(1)
            out.index_copy_(0, index.flatten()[places], product.flatten(0, 1).index_select(0, places))
    return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


Batch = tuple[Tensor, Tensor, Tensor]


def _split(ends: Tensor) -> tuple[list[tuple[int, slice]], Batch | None]:
    """Groups to multiply one by one, and the others as a batch: their numbers (G,), the row at each place (G, C) and
    whether it is one (G, C)."""
    found, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            found.append((group, slice(start, end)))
        start = end
    if len(found) <= FEW:
        return found, None
    n_rows = start
    room = -(-int(ROOM * n_rows / len(found)) // MULTIPLE) * MULTIPLE
    singles = [(group, rows) for group, rows in found if rows.stop - rows.start > room]
    others = [(group, rows) for group, rows in found if rows.stop - rows.start <= room]
    copies = len(others) < len(ends) and room < WORTH_COPYING
    if len(others) <= FEW or n_rows < 2 * len(found) or copies:
        return found, None
    first = torch.tensor([rows.start for _, rows in others])[:, None]
    stop = torch.tensor([rows.stop for _, rows in others])[:, None]
    index = first + torch.arange(room)
    return singles, (torch.tensor([group for group, _ in others]), index.clamp(max=n_rows - 1), index < stop)


class _Dispatch(torch.autograd.Function):
    """Row i of the result is token order[i] // k: a gather both ways, since `order` is a permutation."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return tokens.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, inverse = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """The transpose of `_Dispatch`: each token gets the sum of its k rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return rows.index_select(0, inverse).unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, _ = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def dispatch(tokens: Tensor, order: Tensor, inverse: Tensor, *, k: int) -> Tensor:
    """Tokens (N, D), k times each, in the order (N k,) of their groups; `inverse` undoes `order`."""
    rows: Tensor = _Dispatch.apply(tokens, order, inverse, k)
    return rows


def combine(rows: Tensor, order: Tensor, inverse: Tensor, *, k: int) -> Tensor:
    """The sum (N, D) of each token's k rows (N k, D)."""
    tokens: Tensor = _Combine.apply(rows, order, inverse, k)
    return tokens
