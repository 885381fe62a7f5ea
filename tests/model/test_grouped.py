"""Grouped products against a loop over groups, forward and backward, for every way the rows can be spread."""

import pytest
import torch
from torch import Tensor

from looplm.model.grouped import combine, dispatch, grouped, grouped_on_gpu

SPREADS = {
    "even": [16] * 8,
    "a batch and a large one": [20, 18, 22, 3, 19, 200, 21, 17],
    "some empty": [0, 40, 0, 40, 38, 0, 42, 40],
    "all in one": [0, 0, 120, 0, 0, 0, 0, 0],
    "few rows": [1, 0, 0, 1, 0, 0, 1, 1],
    "none": [0] * 8,
}


def case(loads: list[int], *, d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, running counts, a gradient of the products, and the products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(loads), d_in, generator=generator).requires_grad_()
    weight = torch.randn(len(loads), d_in, d_out, generator=generator).requires_grad_()
    out_grad = torch.randn(sum(loads), d_out, generator=generator)
    group = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    return x, weight, torch.tensor(loads).cumsum(0).int(), out_grad, torch.einsum("nd,ndf->nf", x, weight[group])


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 5), (16, 8)])
@pytest.mark.parametrize("loads", SPREADS.values(), ids=SPREADS)
def test_products_and_gradients_are_those_of_a_loop(loads: list[int], d_in: int, d_out: int) -> None:
    x, weight, ends, out_grad, expected = case(loads, d_in=d_in, d_out=d_out)
    ours = grouped(x, weight, ends)
    torch.testing.assert_close(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours, (x, weight), out_grad),
        torch.autograd.grad(expected, (x, weight), out_grad),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(grouped(x, weight, ends), expected)


@pytest.mark.parametrize("loads", [[16] * 4, [0, 24, 8, 0]], ids=["even", "some empty"])
def test_a_gpus_way_is_the_same_and_keeps_no_copy_of_the_weights(loads: list[int]) -> None:
    x, weight, ends, out_grad, expected = case(loads, d_in=16, d_out=32)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        ours = grouped_on_gpu(x, weight, ends)
    assert ours.dtype == torch.bfloat16
    assert [tuple(t.shape) for t in kept if t.dtype == torch.bfloat16] == [x.shape]
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.1)
    for one, two in zip(
        torch.autograd.grad(ours, (x, weight), out_grad.bfloat16()),
        torch.autograd.grad(expected, (x, weight), out_grad),
        strict=True,
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.2)


def test_rows_and_gradients_may_be_views() -> None:
    """A transposed x, and the gradient of a sum, whose strides are 0."""
    x, weight, ends, _, expected = case([3, 0, 5], d_in=16, d_out=8)
    ours = grouped(x.mT.contiguous().mT, weight, ends)
    torch.testing.assert_close(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_moving_rows_to_their_groups_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    order = torch.randperm(10, generator=generator)
    inverse = order.argsort()

    def there_and_back(tokens: Tensor) -> Tensor:
        return combine(dispatch(tokens, order, inverse, k=2).square(), order, inverse, k=2)

    torch.testing.assert_close(there_and_back(tokens), 2 * tokens.square())
    assert torch.autograd.gradcheck(there_and_back, (tokens,))
