"""Accuracies with their 95 % intervals."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t, 1 to 9 degrees of freedom


@dataclass(frozen=True)
class Score:
    """n_right of n, with the Wilson interval: it stays inside 0..1 and holds at 0 % and 100 %, where n * p is small."""

    n_right: int
    n: int

    def __post_init__(self) -> None:
        assert 0 <= self.n_right <= self.n
        assert self.n > 0

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927), 95 %."""
        n, p = self.n, self.accuracy
        centre = p + Z95**2 / (2 * n)
        half = Z95 * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        scale = 1 + Z95**2 / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

    def as_dict(self) -> dict[str, float | int]:
        """`{"accuracy", "n", "low", "high"}`."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "n": self.n, "low": low, "high": high}


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean of 2 to 10 values and half its 95 % interval (Student's t)."""
    half = T95[len(values) - 2] * statistics.stdev(values) / sqrt(len(values))
    return statistics.mean(values), half
