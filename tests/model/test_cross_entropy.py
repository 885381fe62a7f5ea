"""Loss from hidden states against torch's own cross-entropy in fp64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from conftest import long
from looplm.model.cross_entropy import CHUNK_ROWS, NOT_SCORED, LossChunk, cross_entropy

EAGER = list(product([None, 3.0, 120.0], [0.0, 0.1], [False]))
COMPILED = list(product([3.0, None, 120.0], [0.1, 0.0], [True]))


@pytest.mark.parametrize(("softcap", "label_smoothing", "compiled"), [*EAGER, COMPILED[0], *long(*COMPILED[1:])])
def test_loss_and_gradients_are_torchs(softcap: float | None, label_smoothing: float, compiled: bool) -> None:
    chunk = LossChunk(compiled=compiled)
    for n_rows in (7, CHUNK_ROWS, 2 * CHUNK_ROWS + 100) if not compiled else (100, CHUNK_ROWS + 100):
        generator = torch.Generator().manual_seed(n_rows)
        hidden = torch.randn(n_rows, 16, dtype=torch.float64, generator=generator).requires_grad_()
        weight = torch.randn(40, 16, dtype=torch.float64, generator=generator).requires_grad_()
        targets = torch.randint(0, 40, (n_rows,), generator=generator)
        logits = hidden @ weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        gradients = torch.autograd.grad(2 * expected, (hidden, weight))
        ours_in = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
        options = {"softcap": softcap, "label_smoothing": label_smoothing, "chunk": chunk}
        loss = cross_entropy(*ours_in, targets, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(2 * loss, ours_in), gradients, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(cross_entropy(*ours_in, targets, **options), loss)  # type: ignore[arg-type]


def test_targets_that_are_not_scored_count_for_nothing() -> None:
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(40, 16)
    targets = torch.randint(0, 40, (30,))
    some = targets.where(torch.arange(30) % 3 > 0, NOT_SCORED)
    kept = some != NOT_SCORED
    loss = cross_entropy(hidden, weight, some, chunk=LossChunk())
    torch.testing.assert_close(loss, cross_entropy(hidden[kept], weight, targets[kept], chunk=LossChunk()))
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[~kept].abs().sum() == 0
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, some, chunk=LossChunk()), loss.detach())


def test_bf16_autocast_is_close_and_the_gradients_have_the_parameters_type() -> None:
    hidden, weight = torch.randn(700, 64, requires_grad=True), (torch.randn(40, 64) / 8).requires_grad_()
    targets = torch.randint(0, 40, (700,))
    exact = torch.autograd.grad(cross_entropy(hidden, weight, targets, chunk=LossChunk()), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(hidden, weight, targets, chunk=LossChunk())
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
