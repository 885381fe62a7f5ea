"""One answer, however it is computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cached import cached_logits
from looplm.errors import ConfigError, DataError
from looplm.model.block import run_layers
from looplm.model.init import init_weights
from looplm.model.layer_inputs import Asides
from looplm.model.loop.exit import ACT
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.model.mla import MLA

IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(7))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("n_loops", [1, 2, 5])
@pytest.mark.parametrize("chunks", [[1] * 12, [7, 5], [4, 1, 1, 6]], ids=["token by token", "two chunks", "mixed"])
@torch.inference_mode()
def test_cached_equals_full_forward(variant: LoopedLM, n_loops: int, chunks: list[int]) -> None:
    full = variant(IDS, n_loops=n_loops).logits
    torch.testing.assert_close(cached_logits(variant, IDS, n_loops=n_loops, chunks=chunks, spare=3), full, **CLOSE)


@pytest.mark.parametrize("n_grad", [None, 2])
def test_recomputed_loops_have_the_same_loss_and_gradients(variant: LoopedLM, n_grad: int | None) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = variant.core[0].register_forward_hook(count)
    results = []
    for recompute in (False, True):
        calls, asides = 0, Asides()
        hidden = variant.hidden(IDS, plan=LoopPlan(3, n_grad=n_grad, recompute=recompute), asides=asides)
        loss = hidden.square().mean() + sum(asides.losses, start=torch.zeros(()))
        gradients = torch.autograd.grad(loss, list(variant.parameters()), allow_unused=True)
        assert calls == (3 + (n_grad or 3) if recompute else 3)
        results.append((loss, gradients, asides.loads))
    handle.remove()
    (loss, gradients, loads), (loss_again, gradients_again, loads_again) = results
    assert torch.equal(loss, loss_again)
    for one, two in zip(gradients, gradients_again, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert [(idx, load.tolist()) for idx, load in loads] == [(idx, load.tolist()) for idx, load in loads_again]


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


def test_a_model_made_on_the_meta_device_has_the_same_weights(variant: LoopedLM) -> None:
    config = variant.config
    torch.manual_seed(3)
    late = LoopedLM.on("cpu", config)
    torch.manual_seed(3)
    init_weights(variant, kind=config.init, std=config.init_std)
    ours, theirs = late.state_dict(), variant.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (late.head.weight is late.embed.weight) == config.tied_head


def test_a_text_is_continued_with_the_loops_it_was_begun_with(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    cache = model.new_cache(batch_size=3, capacity=12, n_loops=2)
    positions = torch.arange(12).expand(3, 12)
    with pytest.raises(ConfigError, match="begun with"):
        model(IDS, n_loops=3, cache=cache, positions=positions, n_keys=12)
    with pytest.raises(ConfigError, match="needs positions"):
        model(IDS, n_loops=2, cache=cache)
    with pytest.raises(DataError, match="13 tokens do not fit the cache of 12"):
        model(IDS, n_loops=2, cache=cache, positions=positions + 1, n_keys=13)
    with pytest.raises(ConfigError, match="recompute is for training"):
        model(IDS, plan=LoopPlan(2, recompute=True), cache=cache, positions=positions, n_keys=12)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["loop_norm=true", "adapter={rank: 2, n_loops: 2}", "block.attention.window=3"],
        ["block.stream_scales=true", "block.attention.value_embed={n_channels: 4}"],
        ["core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 2}"],
    ],
    ids=["plain", "norm, adapter, window", "scales, value embeddings", "experts"],
)
@torch.inference_mode()
def test_settled_tokens_skip_loops_and_make_up_for_them_when_needed(
    make_model: Callable[..., LoopedLM], parts: list[str]
) -> None:
    """Tokens that halt at different loops, prompts of different lengths: cached logits are those of a full forward."""
    model = make_model("exit={kind: act, threshold: 0.9}", "inject.kind=add", "n_core=1", *parts)
    assert isinstance(model.exit, ACT)
    torch.nn.init.constant_(model.exit.halt.bias, 0.8)
    widths: list[int] = []
    model.core[0].register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    n_loops, lengths = 9, torch.tensor([12, 5, 8])
    n_run, made_up_for = 0, 0
    full = [
        model(IDS[row : row + 1, : int(length)], n_loops=n_loops).logits[0, -1] for row, length in enumerate(lengths)
    ]
    cache = model.new_cache(batch_size=3, capacity=20, n_loops=n_loops)
    prompt = IDS.where(torch.arange(12) < lengths[:, None], 0)
    out = model(prompt, n_loops=n_loops, cache=cache, positions=torch.arange(12).expand(3, 12), n_keys=12)
    torch.testing.assert_close(out.logits[torch.arange(3), lengths - 1], torch.stack(full), **CLOSE)
    texts = [IDS[row, : int(length)].tolist() for row, length in enumerate(lengths)]
    n_steps = 8
    for step in range(n_steps):
        new = torch.randint(0, 40, (3, 1), generator=torch.Generator().manual_seed(step))
        if step == 4:
            cache.take_rows(torch.tensor([0, 2]))
            lengths, texts = lengths[[0, 2]], [texts[0], texts[2]]
        new = new[: len(texts)]
        widths.clear()
        out = model(new, n_loops=n_loops, cache=cache, positions=lengths[:, None], n_keys=int(lengths.max()) + 1)
        n_run += len(widths)
        made_up_for += sum(width > 1 for width in widths)
        lengths = lengths + 1
        for row, text in enumerate(texts):
            text.append(int(new[row]))
            expected = model(torch.tensor([text]), n_loops=n_loops).logits[0, -1]
            torch.testing.assert_close(out.logits[row, -1], expected, **CLOSE)
    assert n_run < n_steps * n_loops
    assert made_up_for > 0


@torch.inference_mode()
def test_latent_attention_is_the_same_in_both_orders(
    make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(
        "block.attention={kind: mla, n_heads: 2, q_rank: 8, kv_rank: 6, nope_dim: 4, rope_dim: 4, v_dim: 6}"
    )
    logits = []
    for absorbs in (True, False):
        monkeypatch.setattr(MLA, "_absorbs", lambda self, *, n_tokens, n_keys, absorbs=absorbs: absorbs)
        logits.append(cached_logits(model, IDS, n_loops=2, chunks=[7, 3, 1, 1], spare=3))
    torch.testing.assert_close(logits[0], logits[1], **CLOSE)
    torch.testing.assert_close(logits[0], model(IDS, n_loops=2).logits, **CLOSE)
