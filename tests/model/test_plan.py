"""Plans are drawn from their stated distributions."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from looplm.model.loop.plan import (
    ChoicePlanConfig,
    CurriculumPlanConfig,
    LengthPlanConfig,
    LogNormalPoissonPlanConfig,
    PoissonPlanConfig,
    UniformPlanConfig,
)


def test_plans_are_drawn_from_their_stated_distributions() -> None:
    rng = np.random.default_rng(0)
    drawn = [UniformPlanConfig(low=2, high=5).sample(rng, n_tokens=9, n_rows=4).n_loops for _ in range(4000)]
    assert set(drawn) == {2, 3, 4, 5}
    assert abs(np.mean(drawn) - 3.5) < 0.1
    chosen = [ChoicePlanConfig(weights={2: 3.0, 4: 1.0}).sample(rng, n_tokens=9, n_rows=4).n_loops for _ in range(4000)]
    assert set(chosen) == {2, 4}
    assert abs(chosen.count(4) / 4000 - 0.25) < 0.03
    tied = {LengthPlanConfig(max_extra=2).sample(rng, n_tokens=13, n_rows=4).n_loops for _ in range(200)}
    assert tied == {12, 13, 14}


def test_huginns_plan_has_its_published_moments() -> None:
    """1 + Poisson(rate), the rate log-normal: mean 1 + m, variance m + m^2 (exp(sigma^2) - 1), a long upper tail."""
    rng, mean, sigma = np.random.default_rng(0), 8.0, 0.5
    config = LogNormalPoissonPlanConfig(mean=mean, sigma=sigma, n_grad=4)
    plans = [config.sample(rng, n_tokens=9, n_rows=4) for _ in range(20_000)]
    drawn = np.array([plan.n_loops for plan in plans])
    assert drawn.min() >= 1
    assert abs(drawn.mean() - (1 + mean)) < 0.15
    variance = mean + mean**2 * (np.exp(sigma**2) - 1)
    assert abs(drawn.var() / variance - 1) < 0.08
    assert np.median(drawn) < drawn.mean()
    assert {plan.n_grad for plan in plans} == {4}
    assert {plan.per_row for plan in plans} == {None}


@pytest.mark.parametrize(("n_grad", "expected"), [("half", 3), (2, 2), (None, None)])
def test_parcaes_plan_draws_every_sequence_by_itself(n_grad: int | str | None, expected: int | None) -> None:
    rng = np.random.default_rng(0)
    config = PoissonPlanConfig(mean=5, n_grad=n_grad)  # type: ignore[arg-type]
    plans = [config.sample(rng, n_tokens=9, n_rows=8) for _ in range(4000)]
    rows = np.array([plan.per_row for plan in plans])
    for n in range(2, 10):
        share = np.exp(-5) * 5**n / math.factorial(n)
        assert abs((rows == n).mean() - share) < 0.006
    assert abs((rows == 1).mean() - 6 * np.exp(-5)) < 0.006  # Poisson's 0 counts as 1
    assert abs(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1]) < 0.05
    assert all(plan.n_loops == max(plan.per_row or ()) and plan.n_grad == expected for plan in plans)


def test_a_gated_curriculum_draws_up_to_its_level() -> None:
    rng, config = np.random.default_rng(0), CurriculumPlanConfig(low=2, high=5)
    for level, expected in ((0, {2}), (1, {2, 3}), (3, {2, 3, 4, 5}), (9, {2, 3, 4, 5})):
        drawn = [config.at(level).sample(rng, n_tokens=9, n_rows=4).n_loops for _ in range(300)]
        assert set(drawn) == expected
        assert min(drawn.count(n_loops) for n_loops in expected) > 300 / len(expected) / 2
    with pytest.raises(ValidationError, match="nothing would grow"):
        CurriculumPlanConfig(low=3, high=3)
