"""The loss that is shown: single steps jump, by their data and by how many loops they drew."""

from dataclasses import dataclass, field

N_STEPS = 20  # that a mean reaches back


@dataclass
class RecentMean:
    """A mean of everything at first, then one that forgets what is more than about N_STEPS back."""

    value: float = float("nan")
    n: int = 0

    def add(self, value: float) -> None:
        """Take in one more."""
        self.n += 1
        self.value = value if self.n == 1 else self.value + (value - self.value) / min(self.n, N_STEPS)


@dataclass
class ShownLoss:
    """Recent means of a run's loss, of all steps and by the number of loops."""

    overall: RecentMean = field(default_factory=RecentMean)
    by_loops: dict[int, RecentMean] = field(default_factory=dict)

    def add(self, loss: float, by_loops: list[tuple[int, float]]) -> None:
        """Take in a step's loss, and those of its micro-batches with their numbers of loops."""
        self.overall.add(loss)
        for n_loops, each in by_loops:
            self.by_loops.setdefault(n_loops, RecentMean()).add(each)

    def numbers(self) -> dict[str, float]:
        """By name: `loss_mean`, and `loss_mean_N` for N loops where steps have drawn unlike numbers."""
        found = {"loss_mean": self.overall.value}
        if len(self.by_loops) > 1:
            found |= {f"loss_mean_{n_loops}": self.by_loops[n_loops].value for n_loops in sorted(self.by_loops)}
        return found
