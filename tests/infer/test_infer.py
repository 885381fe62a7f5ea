import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import TEXT_VARIANTS, VARIANTS, crossed
from looplm.errors import ConfigError, DataError
from looplm.infer.decoders import EarlyExit, FullDepth
from looplm.infer.engine import generate
from looplm.infer.exits import ExitRule
from looplm.infer.sampling import Sampler, SamplingConfig, keep_likely, keep_top, penalise
from looplm.model.cache import KVCache
from looplm.model.linear import Linear
from looplm.model.looped import LoopedLM
from texts import QUEUE, spread_eos

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]
EOS = 2


@torch.inference_mode()
def greedy_by_full_forward(model: LoopedLM, prompt: list[int], n_new: int, n_loops: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n_new):
        ids.append(int(model(torch.tensor([ids]), n_loops=n_loops).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("n_loops", [1, 3])
def test_batched_generation_equals_one_by_one_without_cache(text_variant: LoopedLM, n_loops: int) -> None:
    variant = text_variant
    together = generate(variant, PROMPTS, eos_id=EOS, max_new_tokens=12, n_loops=n_loops)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation.ids == greedy_by_full_forward(variant, prompt, 12, n_loops)
        alone = generate(variant, [prompt], eos_id=EOS, max_new_tokens=12, n_loops=n_loops)[0]
        assert alone == generation


def test_rows_that_end_leave_the_batch_and_change_nothing(make_model: Callable[..., LoopedLM]) -> None:
    """Every token is EOS for some prompt: ends come at different times, the batch shrinks several times."""
    model = make_model("smear={kind: channel, n_back: 1}", seed=3)
    prompts = [[a, b] for a in range(5, 17) for b in (1, 3)]
    free = generate(model, prompts, eos_id=-1, max_new_tokens=10)
    eos = max(range(40), key=lambda token: len({tuple(g.ids).index(token) for g in free if token in g.ids}))
    ended = generate(model, prompts, eos_id=eos, max_new_tokens=10)
    assert len({len(generation.ids) for generation in ended}) > 1
    for without, generation in zip(free, ended, strict=True):
        cut = without.ids.index(eos) + 1 if eos in without.ids else 10
        assert generation.ids == without.ids[:cut]
        assert generation.stopped_by == ("eos" if eos in without.ids else "length")


@pytest.mark.parametrize(("name", "batch_sizes"), crossed(TEXT_VARIANTS, [(3,), (1, 10)]))
def test_waiting_prompts_take_the_places_of_those_that_end(
    name: str, batch_sizes: tuple[int, ...], make_model: Callable[..., LoopedLM]
) -> None:
    check_queue(make_model(*VARIANTS[name]), batch_sizes)


@pytest.mark.parametrize("inject", ["add", "lti"])
def test_a_prompt_in_anothers_place_runs_the_loops_that_it_left_out(
    inject: str, make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halting after few loops: what waits for a later token to run the others comes along, what was there goes."""
    came = []
    put = KVCache.put

    def counted(self: KVCache, rows: torch.Tensor, new: KVCache, *, n_keys: int) -> None:
        came.append(sum(map(len, new.behind.values())))
        put(self, rows, new, n_keys=n_keys)

    monkeypatch.setattr(KVCache, "put", counted)
    check_queue(make_model(f"inject.kind={inject}", "exit={kind: act, threshold: 0.6}", seed=1))
    assert max(came) > 0


def test_what_texts_left_behind_goes_with_them(make_model: Callable[..., LoopedLM]) -> None:
    """One text after another in the same two rows: the cache holds what waits for the texts that are there now."""
    model = make_model("inject.kind=add", "exit={kind: act, threshold: 0.3}")
    decoder = FullDepth(model, batch_size=2, capacity=8, n_loops=4)
    with torch.inference_mode():
        decoder.prefill([[5, 6], [7]])
        for rows, prompts in (([0], [[8, 9, 3]]), ([1], [[4]]), ([0, 1], [[5, 6], [9, 9]])):
            new = FullDepth(model, batch_size=len(rows), capacity=4, n_loops=4)
            new.prefill(prompts)
            decoder.put(torch.tensor(rows), new, n_keys=3)
    (tokens,) = decoder.cache.behind[1]
    assert tokens.ids.tolist() == [[5, 6], [9, 9]]
    assert tokens.positions.tolist() == [[0, 1], [0, 1]]
    with torch.inference_mode():
        decoder.put(torch.tensor([0, 1]), FullDepth(model, batch_size=2, capacity=4, n_loops=4), n_keys=1)
    assert not decoder.cache.behind[1]


def check_queue(model: LoopedLM, batch_sizes: tuple[int, ...] = (1, 3, 10)) -> None:
    """21 prompts of 1 to 5 tokens through fewer rows: the same tokens and depths as each alone."""
    options: dict[str, Any] = {"max_new_tokens": 12, "n_loops": 5}
    eos = spread_eos(generate(model, QUEUE, eos_id=-1, **options))
    alone = [generate(model, [prompt], eos_id=eos, **options)[0] for prompt in QUEUE]
    assert len({len(generation.ids) for generation in alone}) > 1
    for batch_size in batch_sizes:
        heard: dict[int, list[int]] = {}
        queued = generate(
            model,
            QUEUE,
            eos_id=eos,
            batch_size=batch_size,
            on_token=lambda number, token, heard=heard: heard.setdefault(number, []).append(token),  # type: ignore[misc]
            **options,
        )
        assert queued == alone
        assert [heard[number] for number in range(len(QUEUE))] == [generation.ids for generation in alone]


def test_rows_are_never_more_than_the_batch_and_are_filled_while_prompts_wait(
    make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends come one after another; with 4 rows each end lets the next prompt in at once."""
    rows: list[int] = []
    step = FullDepth.step

    def counted(self: FullDepth, tokens: torch.Tensor, *args: torch.Tensor, **where: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return step(self, tokens, *args, **where)

    monkeypatch.setattr(FullDepth, "step", counted)
    model = make_model("seq_len=20")
    prompts = [[5] * n_prompt for n_prompt in (4, 7, 10, 13, 16, 19, 8, 9)]
    queued = generate(model, prompts, eos_id=-1, max_new_tokens=50, batch_size=4)
    assert [len(generation.ids) for generation in queued] == [16, 13, 10, 7, 4, 1, 12, 11]
    # first tokens come with the prompts: 7 ends after 6 steps, the 4 in its place and 10 after 9, then 1 at once
    assert rows[:15] == [4] * 15
    assert len(rows) == 20  # two batches of four would take 15 + 11
    assert queued == [generate(model, [prompt], eos_id=-1, max_new_tokens=50)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("part", "exits"),
    [
        ("exit={kind: act, threshold: 0.6}", None),
        ("smear={kind: channel, n_back: 2}", None),
        ("smear={kind: channel, n_back: 2}", "recompute"),
        ("inject.kind=lti", "last"),
    ],
)
def test_a_prompt_of_many_texts_runs_once_and_they_part_from_there(
    part: str, exits: Any, make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as one text after another, where no two share anything."""
    model = make_model(part, seed=1)
    early = None if exits is None else EarlyExit(ExitRule("latent", 0.3), exits)
    options: dict[str, Any] = {"eos_id": EOS, "max_new_tokens": 12, "n_loops": 5, "early": early}
    options["sampling"] = SamplingConfig(temperature=1.5)
    prompts = [[5, 6, 7], [9], [5, 6, 7], [5, 6, 7], [9], [11, 12]]
    ran: list[int] = []
    prefill = FullDepth.prefill

    def counted(self: FullDepth, prompts: Any) -> torch.Tensor:
        ran.append(len(prompts))
        return prefill(self, prompts)

    monkeypatch.setattr(FullDepth, "prefill", counted)
    together = generate(model, prompts, **options)
    assert ran == [3]
    assert together == generate(model, prompts, batch_size=1, **options)
    assert together[0].ids != together[2].ids


def test_sampling_does_not_depend_on_batch_mates_and_repeats_by_seed(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    sampling = SamplingConfig(temperature=1.5, seed=4)
    whole = generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=sampling)
    assert generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=sampling) == whole
    assert generate(model, PROMPTS[:2], eos_id=EOS, max_new_tokens=10, sampling=sampling) == whole[:2]
    assert generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=sampling, batch_size=2) == whole
    other = SamplingConfig(temperature=1.5, seed=5)
    assert generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=other) != whole


def test_generation_stops_at_the_context_length(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("seq_len=10")
    generation = generate(model, [[1, 2, 3]], eos_id=-1, max_new_tokens=50)[0]
    assert len(generation.ids) == 7
    assert generation.stopped_by == "length"


def test_tokens_are_reported_as_they_come(make_model: Callable[..., LoopedLM]) -> None:
    heard: dict[int, list[int]] = {}
    generations = generate(
        make_model(),
        PROMPTS,
        eos_id=EOS,
        max_new_tokens=8,
        on_token=lambda row, token: heard.setdefault(row, []).append(token),
    )
    assert [heard[row] for row in range(4)] == [generation.ids for generation in generations]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([], "no prompts"), ([[1], []], "empty"), ([list(range(1, 40)) * 2], "context is 64.*shorten")],
)
def test_what_cannot_be_continued_is_refused(
    make_model: Callable[..., LoopedLM], prompts: list[list[int]], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        generate(make_model(), prompts, eos_id=EOS, max_new_tokens=4)
    with pytest.raises(DataError, match="max_new_tokens is 0"):
        generate(make_model(), [[1]], eos_id=EOS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="n_loops is -2"):
        generate(make_model(), [[1]], eos_id=EOS, max_new_tokens=4, n_loops=-2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        generate(make_model(), [[1]], eos_id=EOS, max_new_tokens=4, batch_size=0)


def n_compiled(model: LoopedLM) -> int:
    """Forms of the model's step and parts so far, since dynamo's counters were cleared."""
    assert model.one_token is not None
    return counters["stats"]["unique_graphs"] + len(model.one_token.step.compiled)


FORMS = [
    pytest.param(
        ["smear={kind: channel, n_back: 2}", "adapter={rank: 2, n_loops: 2}", "loop_norm=true", "softcap=3"],
        id="one",
    ),
    pytest.param(
        [
            "block.attention={kind: mla, n_heads: 2, q_rank: 8, kv_rank: 6, nope_dim: 4, rope_dim: 4, v_dim: 6}",
            "core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 2, n_shared: 1, has_bias: true, n_loop_embeds: 3}",
            "inject.kind=lti",
            "exit={kind: act, threshold: 0.7}",
        ],
        id="parts",
    ),
    pytest.param(
        [
            "block.attention={kind: gqa, n_heads: 4, n_kv_heads: 2, head_dim: 8, window: 3, window_pattern: SL, "
            "qk_norm: after_rope, value_embed: {n_channels: 4}}",
            "block.stream_scales=true",
            "backout=true",
            "block.linear={kind: low_rank, rank: 4}",
        ],
        id="values-and-windows",
    ),
    pytest.param(  # 4 rows: every expert on every token; 3: sorted by expert; 1: by choice
        ["core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 2}", "block.linear={kind: hra, rank: 4, scale: 0.3}"],
        id="experts-as-one",
    ),
    pytest.param(
        ["block.attention.fused_qkv=true", "tied_head=false", "backout=true", "loop_norm=true"],
        id="many-loops",
    ),
]


@pytest.mark.parametrize("overrides", FORMS[1:2])
def test_compiled_decoding_writes_a_queue_of_texts(make_model: Callable[..., LoopedLM], overrides: list[str]) -> None:
    """One shape of the parts, in which prompts take the places of others; test_threads.py has the step as one."""
    model, compiled = make_model(*overrides), make_model(*overrides)
    compiled.compile_decoding()
    counters.clear()
    queues = [
        generate(each, QUEUE[:6], eos_id=EOS, max_new_tokens=12, n_loops=2, batch_size=3) for each in (model, compiled)
    ]
    assert queues[0] == queues[1]
    assert n_compiled(compiled) > 0
    assert not counters["graph_break"]


@pytest.mark.long
@pytest.mark.parametrize("overrides", FORMS)
def test_compiled_decoding_writes_the_same_tokens(
    make_model: Callable[..., LoopedLM],
    overrides: list[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of several sizes, prompts of several lengths, rows that end early, two numbers of loops."""
    if "many-loops" in request.node.name:
        monkeypatch.setattr("looplm.model.looped.MAX_UNROLLED", 1)
    model, compiled = make_model(*overrides), make_model(*overrides)
    compiled.compile_decoding()
    counters.clear()
    for n_loops in (2, 3):
        plain = generate(model, PROMPTS, eos_id=EOS, max_new_tokens=20, n_loops=n_loops)
        assert generate(compiled, PROMPTS, eos_id=EOS, max_new_tokens=20, n_loops=n_loops) == plain
    for some in (slice(2, 3), slice(1, 4)):
        assert generate(compiled, PROMPTS[some], eos_id=EOS, max_new_tokens=20, n_loops=3) == plain[some]
    n_graphs = n_compiled(compiled)
    eos = spread_eos(generate(model, QUEUE[:10], eos_id=-1, max_new_tokens=20, n_loops=3))
    queues = [
        generate(each, QUEUE[:10], eos_id=eos, max_new_tokens=20, n_loops=3, batch_size=3) for each in (model, compiled)
    ]
    assert queues[0] == queues[1]
    assert len({len(generation.ids) for generation in queues[0]}) > 1
    assert n_compiled(compiled) == n_graphs > 0  # three rows again
    assert not counters["graph_break"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weight, atol=0, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("max_unrolled", [0, 99], ids=["parts", "step"])
def test_compiled_for_many_rows_writes_the_same_tokens(
    max_unrolled: int, make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows, whose products are the other way round, and 3, whose are not; the weights stay as they are."""
    monkeypatch.setattr("looplm.model.looped.MAX_UNROLLED", max_unrolled)
    overrides = ["block.linear={kind: hra, rank: 4, scale: 0.3}", "tied_head=false"]
    model, compiled = make_model(*overrides), make_model(*overrides)
    compiled.compile_decoding(n_rows=16)
    turned: list[int] = []
    monkeypatch.setattr(Linear, "forward", watched(turned))
    for prompts in (QUEUE[:16], QUEUE[:3]):
        plain = generate(model, prompts, eos_id=EOS, max_new_tokens=9, n_loops=2)
        assert not turned
        assert generate(compiled, prompts, eos_id=EOS, max_new_tokens=9, n_loops=2) == plain
        assert set(turned) == ({16} if len(prompts) == 16 else set())
        turned.clear()
    for each in (model, compiled):
        each(torch.tensor([PROMPTS[2] * 2])).logits.square().mean().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=0, rtol=0)
        torch.testing.assert_close(other.grad, one.grad)


def watched(turned: list[int]) -> Callable[[Linear, torch.Tensor], torch.Tensor]:
    """`Linear.forward` that notes the rows whose product comes out by column, which is W x^T the other way round."""
    forward = Linear.forward

    def noting(self: Linear, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        if self.out_features > 1 and y.stride(-1) != 1:
            turned.append(x.shape[:-1].numel())
        return y

    return noting


@pytest.mark.long
def test_what_is_compiled_for_one_model_does_not_serve_another(make_model: Callable[..., LoopedLM]) -> None:
    """Like shapes, other weights, another constant."""
    for seed, eps in ((0, 1e-6), (1, 0.5)):
        model, compiled = (make_model(f"block.norm_eps={eps}", seed=seed) for _ in range(2))
        compiled.compile_decoding()
        plain = generate(model, PROMPTS[:2], eos_id=EOS, max_new_tokens=20)
        assert generate(compiled, PROMPTS[:2], eos_id=EOS, max_new_tokens=20) == plain


@pytest.mark.long
def test_a_compiled_model_is_not_copied_or_moved_and_still_trains(make_model: Callable[..., LoopedLM]) -> None:
    """A copy would decode with the first one's weights, a moved one leave its joined weights behind."""
    model, compiled = make_model(), make_model()
    compiled.compile_decoding()
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(compiled)
    with pytest.raises(ConfigError, match="cannot be moved"):
        compiled.bfloat16()
    for each in (model, compiled):
        each(torch.tensor([PROMPTS[2]])).logits.square().mean().backward()
    gradients = dict(compiled.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad)
    for seed in (0, 5):  # what is loaded after compiling is seen
        compiled.load_state_dict(make_model(seed=seed).state_dict())
        plain = generate(make_model(seed=seed), PROMPTS, eos_id=EOS, max_new_tokens=8)
        assert generate(compiled, PROMPTS, eos_id=EOS, max_new_tokens=8) == plain


def test_compiling_without_a_compiler_is_refused(
    make_model: Callable[..., LoopedLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C"):
        make_model().compile_decoding()


@pytest.mark.long
def test_a_compiled_model_fills_its_context_and_no_more(make_model: Callable[..., LoopedLM]) -> None:
    model, compiled = make_model("seq_len=10"), make_model("seq_len=10")
    compiled.compile_decoding()
    whole = generate(model, [[1, 2, 3], [4]], eos_id=-1, max_new_tokens=50)
    assert generate(compiled, [[1, 2, 3], [4]], eos_id=-1, max_new_tokens=50) == whole
    assert len(whole[0].ids) == 7


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def kept(config: SamplingConfig) -> list[int]:
    return keep_likely(LOGITS, min_p=config.min_p, top_p=config.top_p)[0].isfinite().nonzero().flatten().tolist()


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    probabilities = LOGITS.softmax(-1)[0]  # 0.644 0.237 0.087 0.032
    logits, ids = keep_top(torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0]]), 3)
    assert ids is not None
    assert (logits.tolist(), ids.tolist()) == ([[3.0, 3.0, 2.0]], [[1, 3, 4]])
    assert keep_top(LOGITS, 4) == (LOGITS, None)
    assert kept(SamplingConfig(temperature=1.0, top_p=0.6)) == [0]
    assert kept(SamplingConfig(temperature=1.0, top_p=0.7)) == [0, 1]
    assert kept(SamplingConfig(temperature=1.0, top_p=1e-9)) == [0]
    assert kept(SamplingConfig(temperature=1.0, min_p=float(probabilities[2] / probabilities[0]) - 0.01)) == [0, 1, 2]
    assert kept(SamplingConfig(temperature=1.0, min_p=1.0)) == [0]
    assert kept(SamplingConfig()) == [0, 1, 2, 3]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalise(LOGITS, [[0, 3, 3]], 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]


def test_a_draw_among_the_likeliest_is_the_draw_without_the_others() -> None:
    n = 200
    logits = torch.tensor([[-50.0, 1.0, -60.0, 0.5, 2.0]]).expand(n, 5)
    rows, contexts = list(range(n)), [[]] * n
    alone = Sampler(SamplingConfig(temperature=1.0, top_k=3), n_rows=n).choose(logits, rows=rows, contexts=contexts)
    assert alone == Sampler(SamplingConfig(temperature=1.0), n_rows=n).choose(logits, rows=rows, contexts=contexts)
    assert set(alone) == {1, 3, 4}


def test_draws_follow_the_distribution() -> None:
    n = 4000
    sampler = Sampler(SamplingConfig(temperature=1.0), n_rows=n)
    drawn = sampler.choose(LOGITS.expand(n, 4), rows=list(range(n)), contexts=[[]] * n)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / n
    torch.testing.assert_close(shares, LOGITS.softmax(-1)[0], atol=0.03, rtol=0)
