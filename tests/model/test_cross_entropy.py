"""Loss from hidden states against torch's own cross-entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F

from looplm.model.cross_entropy import CHUNK_ROWS, cross_entropy, make_chunk


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_are_torchs(softcap: float | None, label_smoothing: float, compiled: bool) -> None:
    chunk = make_chunk(compiled=compiled)
    for n_rows in (7, CHUNK_ROWS, 2 * CHUNK_ROWS + 100) if not compiled else (CHUNK_ROWS + 100,):
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
