"""One answer, however it is computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looplm.errors import ConfigError, DataError
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, run_layers

IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(7))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def cached_logits(model: LoopedLM, ids: Tensor, *, n_loops: int, chunks: list[int]) -> Tensor:
    """Logits of ids fed through the cache in chunks of the given lengths."""
    n_rows, n_tokens = ids.shape
    assert sum(chunks) == n_tokens
    cache = model.new_cache(batch_size=n_rows, capacity=n_tokens + 3, n_loops=n_loops)
    parts, start, n_back = [], 0, model.n_back
    for length in chunks:
        positions = torch.arange(start, start + length).expand(n_rows, length)
        before = torch.cat([torch.full((n_rows, n_back), -1), ids[:, :start]], dim=1)[:, start : start + n_back]
        part = ids[:, start : start + length]
        out = model(part, n_loops=n_loops, cache=cache, positions=positions, n_keys=start + length, before=before)
        parts.append(out.logits)
        start += length
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("n_loops", [1, 2, 5])
@pytest.mark.parametrize("chunks", [[1] * 12, [7, 5], [4, 1, 1, 6]], ids=["token by token", "two chunks", "mixed"])
@torch.inference_mode()
def test_cached_equals_full_forward(variant: LoopedLM, n_loops: int, chunks: list[int]) -> None:
    full = variant(IDS, n_loops=n_loops).logits
    torch.testing.assert_close(cached_logits(variant, IDS, n_loops=n_loops, chunks=chunks), full, **CLOSE)


@torch.inference_mode()
def test_no_logit_depends_on_a_later_token(variant: LoopedLM) -> None:
    changed = IDS.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 40
    before, after = variant(IDS).logits, variant(changed).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8], after[:, 8])


@torch.inference_mode()
def test_rows_do_not_see_each_other(variant: LoopedLM) -> None:
    torch.testing.assert_close(variant(IDS[1:2]).logits, variant(IDS).logits[1:2], **CLOSE)


@torch.inference_mode()
def test_packed_documents_equal_separate_ones(variant: LoopedLM) -> None:
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3])
    packed = variant.hidden(IDS[:1], plan=LoopPlan(2), documents=documents)
    for start, end in ((0, 5), (5, 9), (9, 12)):
        alone = variant.hidden(IDS[:1, start:end], plan=LoopPlan(2))
        torch.testing.assert_close(packed[:, start:end], alone, **CLOSE)


def test_written_out_attention_equals_the_fused_kernel(variant: LoopedLM) -> None:
    training = variant(IDS).logits  # with gradient: scores written out
    with torch.inference_mode():
        inference = variant(IDS).logits
    torch.testing.assert_close(training.detach(), inference, **CLOSE)


@torch.inference_mode()
def test_one_loop_without_injection_is_a_plain_stack(make_model: Callable[..., LoopedLM]) -> None:
    looped = make_model("n_prelude=1", "n_core=2", "n_coda=1", "n_loops=1")
    plain = make_model("n_prelude=0", "n_core=4", "n_coda=0", "n_loops=1")
    for target, source in zip(plain.blocks(), looped.blocks(), strict=True):
        target.load_state_dict(source.state_dict())
    plain.embed.load_state_dict(looped.embed.state_dict())
    assert torch.equal(looped(IDS).logits, plain(IDS).logits)


@torch.inference_mode()
def test_two_loops_are_the_core_applied_twice(make_model: Callable[..., LoopedLM]) -> None:
    looped = make_model("n_prelude=0", "n_core=1", "n_coda=0")
    unrolled = make_model("n_prelude=0", "n_core=3", "n_coda=0")
    for target in unrolled.blocks():
        target.load_state_dict(next(looped.blocks()).state_dict())
    unrolled.embed.load_state_dict(looped.embed.state_dict())
    assert torch.equal(looped(IDS, n_loops=3).logits, unrolled(IDS, n_loops=1).logits)


def test_truncated_gradient_equals_that_of_the_last_loops_alone(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("inject.kind=add", "n_prelude=0", "n_coda=0")

    def gradient(plan: LoopPlan) -> Tensor:
        model.zero_grad()
        model(IDS, plan=plan).logits.square().sum().backward()
        return model.core[0].attention.q.weight.grad.clone()

    inputs = model.inputs(IDS)
    with torch.no_grad():
        state = model.run_core(model.embed(IDS), plan=LoopPlan(3), inputs=inputs)
    entry = model.embed(IDS)
    model.zero_grad()
    x = run_layers(model.core, model.inject.enter(state, entry, loop_idx=3), inputs=inputs, slots=None)
    model.head(model.norm(x)).square().sum().backward()
    by_hand = model.core[0].attention.q.weight.grad.clone()
    assert by_hand.abs().sum() > 0
    torch.testing.assert_close(gradient(LoopPlan(4, n_grad=1)), by_hand)
    assert not torch.allclose(gradient(LoopPlan(4)), by_hand)
    torch.testing.assert_close(gradient(LoopPlan(4, n_grad=4)), gradient(LoopPlan(4)))


def test_a_sequence_beyond_the_context_is_refused(make_model: Callable[..., LoopedLM]) -> None:
    with pytest.raises(DataError, match="13 tokens do not fit the model's context of 12"):
        make_model("seq_len=12")(torch.zeros(1, 13, dtype=torch.long))


def test_loops_and_a_plan_together_are_refused(make_model: Callable[..., LoopedLM]) -> None:
    with pytest.raises(ConfigError, match="both given"):
        make_model()(IDS, n_loops=2, plan=LoopPlan(3))


@pytest.mark.parametrize("n_loops", [0, -1])
def test_zero_and_negative_loops_are_refused(make_model: Callable[..., LoopedLM], n_loops: int) -> None:
    with pytest.raises(ConfigError, match=f"n_loops is {n_loops}.*at least once"):
        make_model()(IDS, n_loops=n_loops)


def test_forward_draws_no_random_numbers(variant: LoopedLM) -> None:
    state = torch.get_rng_state()
    variant.train()
    first = variant(IDS).logits
    assert torch.equal(first, variant(IDS).logits)
    assert torch.equal(state, torch.get_rng_state())
