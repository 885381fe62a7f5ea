from collections.abc import Callable

import pytest
import torch

from looplm.errors import ConfigError, DataError
from looplm.infer.engine import generate
from looplm.infer.sampling import Sampler, SamplingConfig, keep_likely, penalise
from looplm.model.looped import LoopedLM

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


def test_sampling_does_not_depend_on_batch_mates_and_repeats_by_seed(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    sampling = SamplingConfig(temperature=1.5, seed=4)
    whole = generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=sampling)
    assert generate(model, PROMPTS, eos_id=EOS, max_new_tokens=10, sampling=sampling) == whole
    assert generate(model, PROMPTS[:2], eos_id=EOS, max_new_tokens=10, sampling=sampling) == whole[:2]
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


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def kept(config: SamplingConfig) -> list[int]:
    return keep_likely(LOGITS, config)[0].isfinite().nonzero().flatten().tolist()


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    probabilities = LOGITS.softmax(-1)[0]  # 0.644 0.237 0.087 0.032
    assert kept(SamplingConfig(temperature=1.0, top_k=2)) == [0, 1]
    assert kept(SamplingConfig(temperature=1.0, top_p=0.6)) == [0]
    assert kept(SamplingConfig(temperature=1.0, top_p=0.7)) == [0, 1]
    assert kept(SamplingConfig(temperature=1.0, top_p=1e-9)) == [0]
    assert kept(SamplingConfig(temperature=1.0, min_p=float(probabilities[2] / probabilities[0]) - 0.01)) == [0, 1, 2]
    assert kept(SamplingConfig(temperature=1.0, min_p=1.0)) == [0]
    assert kept(SamplingConfig()) == [0, 1, 2, 3]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalise(LOGITS, [[0, 3, 3]], 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]


def test_draws_follow_the_distribution() -> None:
    n = 4000
    sampler = Sampler(SamplingConfig(temperature=1.0), n_rows=n)
    drawn = sampler.choose(LOGITS.expand(n, 4), rows=list(range(n)), contexts=[[]] * n)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / n
    torch.testing.assert_close(shares, LOGITS.softmax(-1)[0], atol=0.03, rtol=0)
