"""Products of rows with the matrix of their group, forward and backward, and the gathers before and after them.

All are `F.grouped_mm`. In bf16 a CPU pays milliseconds for every new number of rows, because oneDNN writes a kernel for
it, and groups have new sizes at every step. So on a CPU the products run in the weights' own type.
Shapes: N rows sorted by group, E groups, `ends` (E,) running counts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES = 16  # F.grouped_mm takes rows whose size is a multiple of this


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (N, d_in) up to ends[e] times weight[e] (E, d_in, d_out): (N, d_out)."""
    if x.device.type != "cpu":
        return grouped_on_gpu(x, weight, ends)
    x = x.to(weight.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        # a custom op, for its gradient and because a compiler must not look inside; else a direct call will do
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
        # the gradient goes back in the type that x came in, fp32 under autocast
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.to(dtype), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.to(x.dtype)
        # y_n = x_n W_e for the rows n of group e, so dx_n = dy_n W_e^T and dW_e = x_e^T dy_e
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
    with torch.autocast("cpu", enabled=False):
        # autocast off: in bf16 oneDNN would write a kernel for every new size (top of the file)
        # contiguous: rows and gradients may be views with strides that F.grouped_mm refuses
        outer = F.grouped_mm(_padded(x.contiguous(), 1).mT, _padded(y.contiguous(), 1), offs=ends)
    return outer[:, : x.shape[1], : y.shape[1]].contiguous()


@grouped_on_cpu.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # shapes alone, for torch.compile and for tensors without memory
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
    with torch.autocast("cpu", enabled=False):
        # padded to widths that F.grouped_mm takes; the zeros add nothing, and their columns are cut off again
        product = F.grouped_mm(_padded(x.contiguous(), 1), _padded(weight, 2), offs=ends)
    return product[:, : weight.shape[2]].contiguous()


def _padded(x: Tensor, n_dims: int) -> Tensor:
    """With zeros at the end of the last dimensions, as far as F.grouped_mm asks for."""
    multiple = BYTES // x.element_size()
    # F.pad takes a (begin, end) pair for each dimension, the last one first
    short = [-n % multiple for n in x.shape[: -n_dims - 1 : -1]]
    return F.pad(x, [end for n in short for end in (0, n)]) if any(short) else x


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
        # (N k, D) by group, back to (N, k, D) by token: a gather and a sum, faster than index_add
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
