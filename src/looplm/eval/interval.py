"""Accuracies with their 95 % intervals."""

from dataclasses import dataclass
from math import sqrt

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


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
