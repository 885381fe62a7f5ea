"""Extreme options and extreme logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.config import parse
from looplm.errors import CheckpointError, ConfigError
from looplm.infer.sampling import Sampler, SamplingConfig, soften

N_LOGITS = 7
SMALLEST, LARGEST = 5e-324, 1.7e308  # of a Python float


def choose(config: SamplingConfig, logits: torch.Tensor, *, context: list[int] | None = None) -> list[int]:
    rows = list(range(len(logits)))
    return Sampler(config, n_rows=len(logits)).choose(logits, rows=rows, contexts=[context or []] * len(logits))


def positive(*special: float) -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from(special), st.floats(0.01, 10))


@st.composite
def configs(draw: st.DrawFn) -> SamplingConfig:
    temperature = draw(st.sampled_from([0.0, SMALLEST, 1e-45, 1e-40, 1e-7, 1.0, 1e40, 1e300, LARGEST]))
    values = {"temperature": temperature, "repetition_penalty": draw(positive(SMALLEST, 1e-40, 1e40, LARGEST))}
    if temperature:
        values["top_k"] = draw(st.sampled_from([None, 1, 2, N_LOGITS, 10**6]))
        values["top_p"] = draw(st.sampled_from([SMALLEST, 1e-40, 0.3, 1.0]))
        values["min_p"] = draw(st.sampled_from([0.0, SMALLEST, 0.3, 1.0]))
    return SamplingConfig(**values, seed=draw(st.sampled_from([0, 10**14, 2**63 - 1])))


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    number = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-30, 30, width=32))
    row = st.lists(st.one_of(number, st.just(-math.inf)), min_size=N_LOGITS, max_size=N_LOGITS)
    rows = torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    rows[:, draw(st.integers(0, N_LOGITS - 1))] = draw(number)  # something may be chosen
    rows = rows.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return rows.masked_fill(rows == math.inf, 1e38)  # rounded up in bf16


@settings(deadline=None, max_examples=300)
@given(configs(), rows_of_logits(), st.lists(st.integers(0, N_LOGITS + 3), max_size=6))
def test_every_option_chooses_among_the_tokens_that_may_be_chosen(
    config: SamplingConfig, logits: torch.Tensor, context: list[int]
) -> None:
    """A context may hold ids that have no logit."""
    for row, token in enumerate(choose(config, logits, context=context)):
        assert logits[row, token] > -math.inf


@settings(deadline=None)
@given(rows_of_logits())
def test_a_vanishing_temperature_is_greedy(logits: torch.Tensor) -> None:
    best = logits.double().amax(-1)
    for temperature in (SMALLEST, 1e-300, 1e-60):
        (chosen,) = [choose(SamplingConfig(temperature=temperature), logits)]
        assert logits.double()[range(len(logits)), chosen].tolist() == best.tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-40}, {"min_p": 1.0}])
def test_the_tightest_options_are_greedy(options: dict[str, float]) -> None:
    logits = torch.randn(50, N_LOGITS, generator=torch.Generator().manual_seed(0))
    assert choose(SamplingConfig(temperature=5.0, **options), logits) == logits.argmax(-1).tolist()  # type: ignore[arg-type]


def test_an_endless_temperature_draws_evenly() -> None:
    even = soften(torch.tensor([[3.0, -80.0, 1e30, -torch.inf]]), 1e300).softmax(-1)
    torch.testing.assert_close(even, torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64) / 3)


def test_an_extreme_penalty_keeps_the_order_of_what_it_enlarges() -> None:
    logits = torch.tensor([[3.0, 5.0, 4.0, 9.0]])
    assert choose(SamplingConfig(repetition_penalty=1e-40), logits, context=[0, 1, 2]) == [1]
    assert choose(SamplingConfig(repetition_penalty=1e40), logits, context=[3]) == [1]
    assert choose(SamplingConfig(repetition_penalty=1e40), -logits, context=[0, 1, 2, 3]) == [0]


def test_penalties_leave_the_callers_logits_as_they_are() -> None:
    logits = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    choose(SamplingConfig(repetition_penalty=2.0), logits, context=[0, 1])
    assert logits.tolist() == [[3.0, 5.0]]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p", "min_p"])
def test_numbers_that_are_none_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse(SamplingConfig, {"temperature": 1.0, name: float(value)}, source="sampling options")


def test_seeds_are_told_apart_up_to_the_largest_and_refused_beyond() -> None:
    logits = torch.zeros(1, 1000)
    drawn = {choose(SamplingConfig(temperature=1.0, seed=seed), logits)[0] for seed in (0, 10**14, 2**62, 2**63 - 1)}
    assert len(drawn) == 4
    with pytest.raises(ConfigError, match=f"seed.*{2**63}"):
        parse(SamplingConfig, {"seed": 2**63}, source="sampling options")


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=2, top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("bad", [[math.nan] * 3, [1.0, math.nan, 2.0], [1.0, math.inf, 0.0], [-math.inf] * 3])
def test_logits_that_are_not_finite_are_refused(config: SamplingConfig, penalty: float, bad: list[float]) -> None:
    config = config.model_copy(update={"repetition_penalty": penalty})
    logits = torch.tensor([[1.0, 2.0, 3.0], bad])
    with pytest.raises(CheckpointError, match="not finite"):
        choose(config, logits, context=[1])


def test_logits_of_minus_infinity_rule_tokens_out() -> None:
    logits = torch.tensor([[-math.inf, 2.0, -math.inf]])
    for temperature in (0.0, 1e-40, 1.0, 1e300):
        assert choose(SamplingConfig(temperature=temperature), logits, context=[0]) == [1]
