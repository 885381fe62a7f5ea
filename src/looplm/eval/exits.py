"""What stopping early costs and saves, and the threshold that keeps a promise: calibration on held-out sequences.

The promise is about sequences that full depth gets right and the rule gets wrong (`broken`): accuracy cannot fall by
more than their share. Thresholds are tried from the strictest on, each against the exact one-sided bound on that share,
up to the first that fails (fixed-sequence testing), so that the confidence holds for the one that is chosen.
Source of the method: Clopper and Pearson (1934); Angelopoulos et al., Learn then Test (2021).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looplm.checkpoint import write_text
from looplm.data.tasks import permutations
from looplm.errors import CheckpointError, ConfigError
from looplm.eval.interval import Score
from looplm.eval.staircase import check_model, loops_for
from looplm.infer.depth import mean_depth, score_sequences
from looplm.infer.exits import ExitRule, RuleKind
from looplm.model.looped import LoopedLM

FILE = "exit.json"  # of a run folder
CALIBRATION_SEED = 20261125  # other sequences than any that are scored
N_SEQUENCES = 1000
GRID = tuple(factor * 10.0**power for power in range(-4, 0) for factor in (1, 2, 5))
GRIDS: dict[RuleKind, tuple[float, ...]] = {
    "latent": GRID,
    "kl": GRID,
    "entropy": GRID,
    "stable": (32, 24, 16, 12, 8, 6, 4, 3, 2, 1),
}


@dataclass(frozen=True)
class Trial:
    """One rule against full depth on the same sequences."""

    rule: ExitRule
    exact: Score
    """Sequences right with the rule."""
    full: Score
    """Sequences right at full depth."""
    n_broken: int
    """Right at full depth, wrong with the rule."""
    mean_loops: float
    """Loops per token with the rule."""
    full_loops: float
    """Loops per token at full depth."""

    @property
    def saved(self) -> float:
        """Share of the loops left out."""
        return 1 - self.mean_loops / self.full_loops

    def bound(self, confidence: float) -> float:
        """Upper bound on the share of broken sequences."""
        return upper_bound(self.n_broken, self.exact.n, confidence=confidence)


@dataclass(frozen=True)
class Calibration:
    """A rule with what is promised of it."""

    rule: str
    max_loss: float
    confidence: float
    bound: float
    n: int
    n_broken: int
    lengths: list[int]
    loops: str
    mean_loops: float
    full_loops: float

    def save(self, run: Path) -> None:
        """Into the run folder, whole or not at all."""
        write_text(run / FILE, json.dumps(asdict(self), indent=1) + "\n")


def load_rule(run: Path) -> ExitRule:
    """The calibrated rule of a run folder."""
    path = run / FILE
    if not path.is_file():
        raise CheckpointError(f"{str(run)!r} has no calibrated exit rule; make one with `looplm calibrate {run}`")
    try:
        return ExitRule.parse(str(json.loads(path.read_text())["rule"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a calibration ({error}); make it again with `looplm calibrate`"
        ) from None


def upper_bound(n_hits: int, n: int, *, confidence: float) -> float:
    """The largest share that n_hits of n is not too few for, exact and one-sided (Clopper and Pearson, 1934)."""
    if n_hits == n:
        return 1.0
    low, high = n_hits / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = (
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(middle)
            + (n - k) * math.log1p(-middle)
            for k in range(n_hits + 1)
        )
        low, high = (middle, high) if sum(map(math.exp, terms)) > 1 - confidence else (low, middle)
    return high


def fewest_sequences(*, max_loss: float, confidence: float) -> int:
    """Sequences without one broken that it takes to promise max_loss."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_loss))


class Trials:
    """Fresh permutation sequences, an equal number of each length, with their answers and what full depth says."""

    def __init__(
        self,
        model: LoopedLM,
        *,
        lengths: Sequence[int],
        loops: str,
        n_sequences: int,
        seed: int,
        batch_size: int = 64,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        check_model(model)
        self.model, self.batch_size, self.on_progress = model, batch_size, on_progress
        self.ids: list[torch.Tensor] = []
        self.answers: list[torch.Tensor] = []
        self.n_loops: list[int] = []
        rng = np.random.default_rng([seed, n_sequences])
        for number in range(n_sequences):
            length = lengths[number % len(lengths)]
            ids, answers = permutations.sequences(rng, n_sequences=1, length=length)
            self.ids.append(torch.from_numpy(ids[0]))
            self.answers.append(torch.from_numpy(answers[0, 1:]))
            self.n_loops.append(loops_for(loops, length))
        self.full, self.full_loops = self._right(ExitRule("latent", 0))

    def run(self, rule: ExitRule) -> Trial:
        """The rule on all sequences."""
        right, mean_loops = self._right(rule)
        n = len(right)
        n_broken = int((self.full & ~right).sum())
        exact, full = Score(int(right.sum()), n), Score(int(self.full.sum()), n)
        return Trial(rule, exact, full, n_broken, mean_loops, self.full_loops)

    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        """Whether each sequence is right at every position, and loops per token."""
        scored = score_sequences(
            self.model,
            self.ids,
            n_loops=self.n_loops,
            rule=rule,
            batch_size=self.batch_size,
            on_progress=self.on_progress,
        )
        right = [
            bool((each.logits[1:].argmax(-1) == answers).all())
            for each, answers in zip(scored, self.answers, strict=True)
        ]
        return torch.tensor(right), mean_depth(scored)


def calibrate(trials: Trials, *, kind: RuleKind, max_loss: float, confidence: float) -> tuple[list[Trial], Trial]:
    """All that was tried, strictest first, and the loosest rule of `kind` that keeps the promise.

    Raises:
        ConfigError: too few sequences for the promise, or even the strictest threshold breaks it.
    """
    needed = fewest_sequences(max_loss=max_loss, confidence=confidence)
    if len(trials.ids) < needed:
        raise ConfigError(
            f"{len(trials.ids)} sequences cannot show a loss of at most {max_loss:g} with confidence {confidence:g}; "
            f"give --n {needed} or more"
        )
    tried: list[Trial] = []
    for threshold in GRIDS[kind]:
        tried.append(trials.run(ExitRule(kind, threshold)))
        if tried[-1].bound(confidence) > max_loss:
            break
    kept = [trial for trial in tried if trial.bound(confidence) <= max_loss]
    if not kept:
        first = tried[0]
        raise ConfigError(
            f"even {first.rule} breaks {first.n_broken} of {first.exact.n} sequences: no {kind} rule keeps the loss "
            f"within {max_loss:g}; give more loops, another --rule or a larger --max-loss"
        )
    return tried, kept[-1]


def as_calibration(
    trial: Trial, *, max_loss: float, confidence: float, lengths: Sequence[int], loops: str
) -> Calibration:
    """What is stored of the chosen trial."""
    return Calibration(
        rule=str(trial.rule),
        max_loss=max_loss,
        confidence=confidence,
        bound=trial.bound(confidence),
        n=trial.exact.n,
        n_broken=trial.n_broken,
        lengths=list(lengths),
        loops=loops,
        mean_loops=trial.mean_loops,
        full_loops=trial.full_loops,
    )


def as_record(trial: Trial, *, confidence: float) -> dict[str, Any]:
    """A trial as JSON."""
    return {
        "rule": str(trial.rule),
        "exact": trial.exact.as_dict(),
        "full": trial.full.as_dict(),
        "n_broken": trial.n_broken,
        "bound": trial.bound(confidence),
        "mean_loops": trial.mean_loops,
        "full_loops": trial.full_loops,
    }
