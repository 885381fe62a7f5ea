"""Learning-rate schedules as a function of progress through the budget, 0 to 1."""

import math
from typing import Literal

from pydantic import Field, model_validator

from looplm.config import Config, Number


class ScheduleConfig(Config):
    """Linear warm-up, constant, decay: all in shares of the budget, whatever its unit. With
    warmup + decay = 1 and shape cosine it is the usual cosine schedule."""

    warmup: Number = Field(default=0.02, ge=0, le=1)
    """Share of the budget over which the rate rises from 0."""
    decay: Number = Field(default=0.4, ge=0, le=1)
    """Share of the budget over which the rate falls at the end."""
    shape: Literal["linear", "cosine"] = "linear"
    """How the rate falls."""
    final: Number = Field(default=0.0, ge=0, le=1)
    """Rate at the very end, as a share of the peak."""

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleConfig":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the budget (1.0)")
        return self

    def scale(self, progress: float) -> float:
        """The rate at `progress` (0 to 1) as a share of the peak."""
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-3)
        left = 1 - progress
        if left < self.decay:
            share = max(left, 0.0) / self.decay
            if self.shape == "cosine":
                share = (1 - math.cos(math.pi * share)) / 2
            return self.final + (1 - self.final) * share
        return 1.0
