"""How many loops run and how many of them carry gradient. The plan is an argument of forward, never state of the model.

Samplers draw one plan per training step from a generator seeded by (seed, step), so a resumed run draws what the
uninterrupted one would have drawn, with nothing to store.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from looplm.config import (
    MOST_LOOPS,
    Config,
    Loops,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
)
from looplm.errors import ConfigError

MOST_SIGMA = 4.0  # the rate is then beyond 1,000 times its median once in 25 draws


@dataclass(frozen=True)
class LoopPlan:
    """`n_loops` passes through the core, the last `n_grad` of them with gradient (None: all of them). With `recompute`
    the backward pass computes each loop again instead of keeping its activations. `per_row` gives every row of the
    batch its own number, of which `n_loops` is the largest; a row that has run its loops leaves the batch."""

    n_loops: int
    n_grad: int | None = None
    recompute: bool = False
    per_row: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, number in (("n_loops", self.n_loops), ("n_grad", self.n_grad), *self._rows()):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | np.integer)):
                raise ConfigError(f"{name} is {number!r:.60}; give a whole number")
        if self.n_loops < 1:
            raise ConfigError(f"n_loops is {self.n_loops}; a looped model runs its core at least once: give 1 or more")
        if self.n_loops > MOST_LOOPS:
            raise ConfigError(f"n_loops is {self.n_loops}; no more than {MOST_LOOPS:,} are run: give fewer")
        if self.n_grad is not None and self.n_grad < 1:
            raise ConfigError(f"n_grad is {self.n_grad}; give 1 or more, or None for gradient through every loop")
        if self.per_row is not None and (
            not self.per_row or min(self.per_row) < 1 or max(self.per_row) != self.n_loops
        ):
            raise ConfigError(
                f"per_row is {self.per_row} and n_loops {self.n_loops}; give every row 1 or more, and their largest as "
                "n_loops"
            )

    def _rows(self) -> list[tuple[str, int]]:
        return [("a number of per_row", number) for number in self.per_row or ()]

    @classmethod
    def of_rows(cls, per_row: Sequence[int], *, n_grad: int | None = None) -> "LoopPlan":
        """A number of loops for every row of the batch."""
        return cls(max(per_row, default=0), n_grad=n_grad, per_row=tuple(per_row))

    @property
    def mean_loops(self) -> float:
        """Loops run per sequence, averaged over the batch."""
        return self.n_loops if self.per_row is None else sum(self.per_row) / len(self.per_row)

    def carries_gradient(self, loop_idx: int, *, n_loops: int | None = None) -> bool:
        """Whether this loop is inside the backpropagated tail, of a row that runs `n_loops` (None: the plan's)."""
        return self.n_grad is None or loop_idx >= (n_loops or self.n_loops) - self.n_grad


class FixedPlanConfig(Config):
    """The same number of loops at every step."""

    kind: Literal["fixed"] = "fixed"
    n_loops: Loops
    """Passes through the core."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        return LoopPlan(self.n_loops)


class UniformPlanConfig(Config):
    """A number of loops drawn uniformly from low..high at every step."""

    kind: Literal["uniform"] = "uniform"
    low: Loops
    """Fewest loops."""
    high: Loops
    """Most loops."""

    @model_validator(mode="after")
    def _ordered(self) -> "UniformPlanConfig":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        return LoopPlan(int(rng.integers(self.low, self.high + 1)))


class ChoicePlanConfig(Config):
    """A number of loops drawn at every step with the given weights: mostly the usual one, now and then a deeper one."""

    kind: Literal["choice"] = "choice"
    weights: dict[Annotated[int, Field(ge=1, le=MOST_LOOPS)], PositiveFloat]
    """Relative weight of each number of loops."""

    @model_validator(mode="after")
    def _not_empty(self) -> "ChoicePlanConfig":
        if not self.weights:
            raise ValueError("no number of loops has a weight; name at least one, as {2: 0.7, 3: 0.3}")
        return self

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        shares = np.array(list(self.weights.values()))
        return LoopPlan(int(rng.choice(list(self.weights), p=shares / shares.sum())))


class LengthPlanConfig(Config):
    """As many loops as the task has steps, plus 0..max_extra: the recipe of the loop staircase (spec loops, 3.3)."""

    kind: Literal["length"] = "length"
    max_extra: NonNegativeInt = Field(default=2, le=MOST_LOOPS)
    """Most loops beyond the length."""
    n_prefix: NonNegativeInt = 1
    """Tokens before the first task token (BOS), which need no loop."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        n_loops = max(1, n_tokens - self.n_prefix) + int(rng.integers(0, self.max_extra + 1))
        return LoopPlan(min(n_loops, MOST_LOOPS))


class LogNormalPoissonPlanConfig(Config):
    """A long-tailed number of loops at every step: 1 + Poisson(rate), the rate drawn from a log-normal whose mean is
    `mean`, so that the mean number of loops is `mean` + 1 (Huginn, 2025). The last `n_grad` carry gradient."""

    kind: Literal["lognormal_poisson"] = "lognormal_poisson"
    mean: PositiveFloat = Field(le=MOST_LOOPS)
    """Mean of the Poisson rate, in loops."""
    sigma: NonNegativeFloat = Field(default=0.5, le=MOST_SIGMA)
    """Standard deviation of the rate's logarithm."""
    n_grad: PositiveInt | None = 8
    """Most loops that gradient flows through, the last ones; null for all."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        rate = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return LoopPlan(1 + min(int(rng.poisson(min(rate, MOST_LOOPS))), MOST_LOOPS - 1), n_grad=self.n_grad)


class PoissonPlanConfig(Config):
    """A number of loops for every sequence of the batch: max(1, Poisson(mean)) (Parcae, 2026). Sequences that have run
    theirs leave the batch, so that a step costs what its loops cost."""

    kind: Literal["poisson"] = "poisson"
    mean: PositiveFloat = Field(le=MOST_LOOPS)
    """Mean of the Poisson draw, in loops."""
    n_grad: PositiveInt | Literal["half"] | None = "half"
    """Most loops of a sequence that gradient flows through, its last ones: half of the mean, rounded up, as Parcae
    trains; null for all."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens."""
        n_grad = math.ceil(self.mean / 2) if self.n_grad == "half" else self.n_grad
        per_row = np.clip(rng.poisson(self.mean, size=n_rows), 1, MOST_LOOPS).tolist()
        return LoopPlan.of_rows(per_row, n_grad=n_grad)


class CurriculumPlanConfig(Config):
    """A number of loops drawn uniformly from `low` up to a most that grows: from `low` to `high`, by one whenever the
    model is right often enough at the most so far (the accuracy gate of LT&G, spec loops, 2.7)."""

    kind: Literal["curriculum"] = "curriculum"
    low: Loops = 1
    """Fewest loops, and the most at first."""
    high: Loops
    """The most in the end."""
    accuracy: Number = Field(default=0.95, gt=0, le=1)
    """Share of the scored tokens to have right before the most grows."""

    @model_validator(mode="after")
    def _grows(self) -> "CurriculumPlanConfig":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}: nothing would grow")
        return self

    @property
    def n_levels(self) -> int:
        """How often the most can grow."""
        return self.high - self.low

    def at(self, level: int) -> UniformPlanConfig:
        """The plan after it has grown `level` times."""
        return UniformPlanConfig(low=self.low, high=self.low + min(level, self.n_levels))

    def sample(self, rng: np.random.Generator, *, n_tokens: int, n_rows: int) -> LoopPlan:
        """One plan for a batch of `n_rows` sequences of `n_tokens` tokens, fully grown."""
        return self.at(self.n_levels).sample(rng, n_tokens=n_tokens, n_rows=n_rows)


PlanConfig = Annotated[
    FixedPlanConfig
    | CurriculumPlanConfig
    | UniformPlanConfig
    | ChoicePlanConfig
    | LengthPlanConfig
    | LogNormalPoissonPlanConfig
    | PoissonPlanConfig,
    Field(discriminator="kind"),
]
