"""Muon against torch.optim's."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from conftest import long
from looplm.optim.muon import POLAR_EXPRESS, Muon, orthogonalize


def step_alike(
    ours: list[nn.Parameter], theirs: list[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], *, n_steps: int
) -> None:
    """Steps of both on the same random gradients."""
    for _ in range(n_steps):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch(weight_decay: float) -> None:
    shapes = [(16, 16), (24, 16), (16, 16), (16, 40)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=weight_decay),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="original"),
    )
    step_alike(ours, theirs, optimizers, n_steps=5)
    for mine, other, first in zip(ours, theirs, start, strict=True):
        assert (mine - first).norm() > 0.1
        # the iteration runs in bf16, and a batched product rounds in another order than a single one
        assert (mine - other).norm() < 0.02 * (other - first).norm()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 20, 8), (2, 8, 20)])
def test_singular_values_come_out_near_one(shape: tuple[int, int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spread = torch.linspace(0.1, 1, u.shape[-1])  # a random square matrix may be all but singular
    values = torch.linalg.svdvals(orthogonalize(u * spread @ v))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_stack_is_stepped_as_its_matrices() -> None:
    start = torch.randn(3, 12, 8)
    stack, singles = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    stack.grad = torch.randn(3, 12, 8)
    for single, gradient in zip(singles, stack.grad, strict=True):
        single.grad = gradient.clone()
    Muon([stack], lr=0.1).step()
    Muon(singles, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([single.detach() for single in singles]))


@pytest.mark.parametrize("beta2", [0.9, *long((None,))])
def test_compiled_it_takes_the_same_steps(beta2: float | None) -> None:
    start = [torch.randn(shape) for shape in ((16, 16), (24, 16), (16, 40), (3, 8, 12))]
    plain, compiled = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [
        Muon(each, lr=0.1, beta2=beta2, dtype=torch.float32, compiled=each is compiled) for each in (plain, compiled)
    ]
    counters.clear()
    step_alike(plain, compiled, optimizers, n_steps=3)
    for mine, other, first in zip(plain, compiled, start, strict=True):
        assert (mine - first).norm() > 0.1
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == len(start)
    assert not counters["graph_break"]


def test_a_matrix_without_gradient_stays_and_a_vector_is_refused() -> None:
    still, moving = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    before = still.detach().clone()
    optimizer = Muon([still, moving], lr=0.1)
    moving.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(still, before)
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([nn.Parameter(torch.randn(4))], lr=0.1)


def test_in_fp32_the_iteration_is_that_of_fp64() -> None:
    matrices = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices.double(), dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrices, dtype=torch.float32).double(), exact, rtol=1e-4, atol=1e-4)
    assert (orthogonalize(matrices).double() - exact).abs().max() > 1e-3  # in bf16 it is not


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_normuon_is_the_written_out_step(shape: tuple[int, int]) -> None:
    """As spec nanochat has it, one matrix at a time."""
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape))
    p, momentum, second = parameter.detach().clone(), torch.zeros(shape), None
    optimizer = Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.3, beta2=0.8, dtype=torch.float32)
    m, n = shape
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        momentum = 0.9 * momentum + 0.1 * parameter.grad
        x = 0.1 * parameter.grad + 0.9 * momentum
        x = x * (x.norm() / m**0.5 / x.norm(dim=1, keepdim=True))
        x = x / (1.01 * x.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x * (min(m, n) ** 0.5 / x.norm())
        squares = x.square().mean(dim=1 if m >= n else 0, keepdim=True)
        second = 0.2 * squares + (0 if second is None else 0.8 * second)
        size = x.norm()
        x = x / second.sqrt()
        x = x * (size / x.norm())
        rate = 0.02 * max(1, m / n) ** 0.5
        p = p - rate * x - rate * 0.3 * p * (x * p >= 0)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), p, atol=1e-5, rtol=1e-4)


def test_a_stack_of_experts_takes_normuon_s_steps_one_by_one() -> None:
    stack = nn.Parameter(torch.randn(3, 8, 5))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizers = [Muon(each, lr=0.02, beta2=0.9, weight_decay=0.1, dtype=torch.float32) for each in ([stack], single)]
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for matrix, gradient in zip(single, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in single]))
