"""How many loops run and how many of them carry gradient. The plan is an argument of forward, never state of the model.

Samplers draw one plan per training step from a generator seeded by (seed, step), so a resumed run draws what the
uninterrupted one would have drawn, with nothing to store.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from looplm.config import Config
from looplm.errors import ConfigError


@dataclass(frozen=True)
class LoopPlan:
    """`n_loops` passes through the core, the last `n_grad` of them with gradient (None: all of them). With `recompute`
    the backward pass computes each loop again in place of keeping its activations."""

    n_loops: int
    n_grad: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.n_loops < 1:
            raise ConfigError(f"n_loops is {self.n_loops}; a looped model runs its core at least once: give 1 or more")
        if self.n_grad is not None and self.n_grad < 1:
            raise ConfigError(f"n_grad is {self.n_grad}; give 1 or more, or None for gradient through every loop")

    def carries_gradient(self, loop_idx: int) -> bool:
        """Whether this loop is inside the backpropagated tail."""
        return self.n_grad is None or loop_idx >= self.n_loops - self.n_grad


class FixedPlanConfig(Config):
    """The same number of loops at every step."""

    kind: Literal["fixed"] = "fixed"
    n_loops: PositiveInt
    """Passes through the core."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int) -> LoopPlan:
        """One plan for a batch of `n_tokens` tokens a sequence."""
        return LoopPlan(self.n_loops)


class UniformPlanConfig(Config):
    """A number of loops drawn uniformly from low..high at every step."""

    kind: Literal["uniform"] = "uniform"
    low: PositiveInt
    """Fewest loops."""
    high: PositiveInt
    """Most loops."""

    @model_validator(mode="after")
    def _ordered(self) -> "UniformPlanConfig":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def sample(self, rng: np.random.Generator, *, n_tokens: int) -> LoopPlan:
        """One plan for a batch of `n_tokens` tokens a sequence."""
        return LoopPlan(int(rng.integers(self.low, self.high + 1)))


class ChoicePlanConfig(Config):
    """A number of loops drawn at every step with the given weights: mostly the usual one, now and then a deeper one."""

    kind: Literal["choice"] = "choice"
    weights: dict[PositiveInt, PositiveFloat]
    """Relative weight of each number of loops."""

    @model_validator(mode="after")
    def _not_empty(self) -> "ChoicePlanConfig":
        if not self.weights:
            raise ValueError("no number of loops has a weight; name at least one, as {2: 0.7, 3: 0.3}")
        return self

    def sample(self, rng: np.random.Generator, *, n_tokens: int) -> LoopPlan:
        """One plan for a batch of `n_tokens` tokens a sequence."""
        shares = np.array(list(self.weights.values()))
        return LoopPlan(int(rng.choice(list(self.weights), p=shares / shares.sum())))


class LengthPlanConfig(Config):
    """As many loops as the task has steps, plus 0..max_extra: the recipe of the loop staircase (spec loops, 3.3)."""

    kind: Literal["length"] = "length"
    max_extra: NonNegativeInt = 2
    """Most loops beyond the length."""
    n_prefix: NonNegativeInt = 1
    """Tokens before the first task token (BOS), which need no loop of their own."""

    def sample(self, rng: np.random.Generator, *, n_tokens: int) -> LoopPlan:
        """One plan for a batch of `n_tokens` tokens a sequence."""
        return LoopPlan(max(1, n_tokens - self.n_prefix) + int(rng.integers(0, self.max_extra + 1)))


PlanConfig = Annotated[
    FixedPlanConfig | UniformPlanConfig | ChoicePlanConfig | LengthPlanConfig, Field(discriminator="kind")
]
