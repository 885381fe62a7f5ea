"""What stopping early costs and saves, and calibration: the threshold that keeps a stated loss on held-out sequences.

The promise is about sequences that full depth gets right and the rule gets wrong (`broken`): accuracy cannot fall by
more than their share. Thresholds are tried from the strictest on, each against the exact one-sided bound on that share,
up to the first that fails (fixed-sequence testing), so that the confidence holds for the one that is chosen.
Source of the method: Clopper and Pearson (1934); Angelopoulos et al., Learn then Test (2021).
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looplm.checkpoint import weights_folder, write_text
from looplm.data.tasks import REASONING, permutations
from looplm.errors import CheckpointError, ConfigError, LooplmError
from looplm.eval.interval import Score
from looplm.eval.reasoning import evaluate, held_out_questions
from looplm.eval.staircase import check_lengths, check_model, loops_for
from looplm.infer.decoders import EarlyExit, Missing
from looplm.infer.depth import mean_depth, score_sequences
from looplm.infer.exits import ExitRule, RuleKind
from looplm.infer.reasoner import Reasoner
from looplm.model.looped import LoopedLM
from looplm.reading import read_json

FILE = "exit.json"  # of a run folder
CALIBRATION_SEED = 20261125  # other sequences than any that are scored
N_SEQUENCES = 1000
# Full depth has to be right at least this often: more than guessing reaches on any suite. Of less there is little to
# lose, and a bound on what is lost would say nothing about the rule.
LEAST_ACCURACY = 0.25
GRID = tuple(factor * 10.0**power for power in range(-4, 0) for factor in (1, 2, 5))
GRIDS: dict[RuleKind, tuple[float, ...]] = {
    "latent": GRID,
    "kl": GRID,
    "entropy": GRID,
    "stable": (32, 24, 16, 12, 8, 6, 4, 3, 2, 1),
    "gate": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
}
# generated text: few loops, each of which changes much
TEXT_GRIDS: dict[RuleKind, tuple[float, ...]] = {
    **GRIDS,
    "latent": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    "stable": (8, 6, 5, 4, 3, 2, 1),
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
    missing: str
    max_loss: float
    confidence: float
    bound: float
    n: int
    n_broken: int
    asked: str
    """What it was calibrated on."""
    mean_loops: float
    full_loops: float
    weights: str
    """The checkpoint that it holds for; empty for weights that stay as they are."""

    def save(self, run: Path) -> None:
        """Into the run folder, whole or not at all."""
        write_text(run / FILE, json.dumps(asdict(self), indent=1) + "\n")


def load_exit(run: Path) -> EarlyExit:
    """The calibrated rule of a run folder."""
    path = run / FILE
    if not path.is_file():
        raise CheckpointError(f"{str(run)!r} has no calibrated exit rule; make one with `looplm calibrate {run}`")
    try:
        stored = read_json(path, error=CheckpointError)
        early, calibrated = EarlyExit(ExitRule.parse(str(stored["rule"])), stored["missing"]), str(stored["weights"])
    except (LooplmError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a calibration ({error}); make it again with `looplm calibrate`"
        ) from None
    if calibrated != weights_name(run):
        raise CheckpointError(
            f"{str(path)!r} is of {calibrated or 'other weights'} and the run is at {weights_name(run) or 'others'}: "
            f"what it promises may not hold for them; calibrate again with `looplm calibrate {run}`"
        )
    return early


def weights_name(run: Path) -> str:
    """What `Calibration.weights` is for a run folder as it stands."""
    weights = weights_folder(run)
    return "" if weights == run else weights.name


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


def check_promise(n: int, *, max_loss: float, confidence: float) -> None:
    """Refuse to promise max_loss of so few sequences that it could not be shown with none of them broken."""
    needed = math.ceil(math.log(1 - confidence) / math.log1p(-max_loss))
    if n < needed:
        raise ConfigError(
            f"{n} questions cannot show a loss of at most {max_loss:g} with confidence {confidence:g}; "
            f"give --n {needed} or more"
        )


def check_worth_keeping(full: Score, *, max_loss: float) -> None:
    """Refuse to promise that a model keeps an accuracy that it does not have.

    Raises:
        ConfigError: full depth is right too seldom, or max_loss is more than half of what there is to lose.
    """
    shown = f"full depth is right on {full.n_right:,} of {full.n:,} ({100 * full.accuracy:.1f} %)"
    if full.accuracy < LEAST_ACCURACY:
        raise ConfigError(
            f"{shown}, and an exit rule could only promise to keep that: train the model, or choose loops or questions "
            f"where it is right on {LEAST_ACCURACY:.0%} or more"
        )
    if full.accuracy < 2 * max_loss:
        raise ConfigError(
            f"{shown}, and a loss of {max_loss:g} is more than half of it: give a --max-loss of at most "
            f"{full.accuracy / 2:.2g}"
        )


class Trials(ABC):
    """Held-out questions, with what full depth makes of them."""

    grids = GRIDS
    """Thresholds to try, strictest first."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.full, self.full_loops = self._right(ExitRule("latent", 0))

    @abstractmethod
    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        """Whether each question is answered right (n,), and loops per token."""

    def run(self, rule: ExitRule) -> Trial:
        """The rule on all questions."""
        right, mean_loops = self._right(rule)
        n_broken = int((self.full & ~right).sum())
        exact, full = Score(int(right.sum()), self.n), Score(int(self.full.sum()), self.n)
        return Trial(rule, exact, full, n_broken, mean_loops, self.full_loops)


class SequenceTrials(Trials):
    """Fresh permutation sequences, an equal number of each length, right where all positions are."""

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
        check_lengths(model, lengths)
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
        super().__init__(n_sequences)

    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        scored = score_sequences(
            self.model,
            self.ids,
            n_loops=self.n_loops,
            rule=rule,
            batch_size=self.batch_size,
            on_progress=self.on_progress,
        )
        right = [
            bool((each.logits[1:].argmax(-1).cpu() == answers).all())
            for each, answers in zip(scored, self.answers, strict=True)
        ]
        return torch.tensor(right), mean_depth(scored)


class QuestionTrials(Trials):
    """Held-out questions of the reasoning suite, as many of each task as of any other, give or take one, answered
    greedily."""

    grids = TEXT_GRIDS

    def __init__(
        self,
        reasoner: Reasoner,
        *,
        n: int,
        seed: int,
        n_loops: int | None = None,
        missing: Missing = "recompute",
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.reasoner, self.n_loops, self.missing, self.on_progress = reasoner, n_loops, missing, on_progress
        per_task = -(-n // len(REASONING))
        drawn = held_out_questions(per_task, seed=seed)
        self.questions = [
            drawn[task * per_task + number] for number in range(per_task) for task in range(len(REASONING))
        ][:n]
        super().__init__(n)

    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        early = EarlyExit(rule, self.missing) if rule.threshold else None
        result = evaluate(
            self.reasoner, self.questions, n_loops=self.n_loops, early=early, on_progress=self.on_progress
        )
        return torch.tensor(result.right), result.mean_loops


def calibrate(trials: Trials, *, kind: RuleKind, max_loss: float, confidence: float) -> tuple[list[Trial], Trial]:
    """All that was tried, strictest first, and the loosest rule of `kind` that keeps the promise.

    Raises:
        ConfigError: too few sequences for the promise, too few of them right at full depth, or even the strictest
            threshold breaks it.
    """
    check_promise(trials.n, max_loss=max_loss, confidence=confidence)
    full = Score(int(trials.full.sum()), trials.n)
    check_worth_keeping(full, max_loss=max_loss)
    tried: list[Trial] = []
    for threshold in trials.grids[kind]:
        tried.append(trials.run(ExitRule(kind, threshold)))
        if tried[-1].bound(confidence) > max_loss:
            break
    kept = [trial for trial in tried if trial.bound(confidence) <= max_loss]
    if not kept:
        first = tried[0]
        raise ConfigError(
            f"even {first.rule} breaks {first.n_broken} of {first.exact.n} answers: no {kind} rule keeps the loss "
            f"within {max_loss:g}; give more loops, another --rule or a larger --max-loss"
        )
    return tried, kept[-1]


def as_calibration(
    trial: Trial, *, max_loss: float, confidence: float, missing: Missing, asked: str, weights: str
) -> Calibration:
    """What is stored of the chosen trial."""
    return Calibration(
        rule=str(trial.rule),
        missing=missing,
        max_loss=max_loss,
        confidence=confidence,
        bound=trial.bound(confidence),
        n=trial.exact.n,
        n_broken=trial.n_broken,
        asked=asked,
        mean_loops=trial.mean_loops,
        full_loops=trial.full_loops,
        weights=weights,
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
