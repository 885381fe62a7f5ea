"""The dial, measured: quality by number of loops up to four times the trained one, what the state does meanwhile, and
what follows for the model. Held-out data only.

A looped model *settles* when later loops change the state less and less: then more of them are safe, and a token whose
state has settled can stop. One that *drifts* falls apart beyond the depth it was trained at.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from looplm.checkpoint import LoadedRun
from looplm.data.pack import IGNORE, Batch
from looplm.data.sources import (
    DataConfig,
    PermutationsConfig,
    ReasoningConfig,
    ReasoningSource,
    held_out_text,
    parse_data,
)
from looplm.data.tasks import permutations
from looplm.errors import CheckpointError, DataError
from looplm.eval.interval import Score
from looplm.eval.reasoning import FORMAT_TASK, as_reasoner, evaluate, held_out_questions
from looplm.eval.staircase import evaluate_staircase
from looplm.infer.sampling import check_finite
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.model.partial import relative_change

BEYOND = 4  # times the trained depth
MAX_TEXT_BATCHES = 32
TEXT_KINDS = ("bytes", "prepared")
N_BATCHES = 4  # for loss and states: rows of worked solutions, or sequences
LOSS_SEED = 20261124
# Of the loops beyond the trained depth. The state's size may grow by this before it counts as drifting ...
MAX_GROWTH = 1.5
# ... and its relative change must shrink by this factor per loop, or have become this small, to count as settling.
SETTLING_RATE, SETTLED_CHANGE = 0.95, 1e-3
GUESSED = 1 / 7  # of the reasoning suite: two of its seven tasks offer two answers, the others too many to guess

Kind = Literal["settling", "marginal", "drifting"]


@dataclass(frozen=True)
class DialRow:
    """Quality at one number of loops."""

    loops: int
    score: Score
    loss: float  # nats per scored token

    def as_dict(self) -> dict[str, float | int]:
        return {"loops": self.loops, **self.score.as_dict(), "loss": self.loss}


@dataclass(frozen=True)
class StateAt:
    """The state after one loop, over the scored tokens."""

    loop: int  # 1 is the first
    norm: float  # root mean square
    change: float | None  # size of the change by this loop over the size of the state; None for the first


@dataclass(frozen=True)
class Diagnosis:
    """What the state does beyond the trained depth."""

    kind: Kind
    rate: float  # factor per loop of the relative change
    last_change: float
    growth: float  # factor of the state's size


@dataclass(frozen=True)
class Dial:
    """All that was measured."""

    trained: int
    what: str
    rows: list[DialRow]
    states: list[StateAt] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    guessed: float = 0.0
    """Accuracy of the best guess that does not look at the question."""

    @property
    def verdict(self) -> str:
        """One line, with no difference claimed that the questions do not show, and nothing at all where no number of
        loops does better than guessing."""
        at = next(row for row in self.rows if row.loops == self.trained)
        said = [f"{_loops(self.trained)}, as trained: {_percent(at.score)}"]
        if all(row.score.interval[0] <= self.guessed for row in self.rows):
            said.append(
                f"no number of loops is shown to do better than guessing ({100 * self.guessed:.1f} %), so nothing "
                "follows about loops: train longer or score more"
            )
            return "; ".join(said)
        half = [row for row in self.rows if row.loops == max(1, self.trained // 2) < self.trained]
        said += [f"half of them: {_percent(row.score)} ({_difference(row.score, at.score)})" for row in half]
        deeper = [row for row in self.rows if row.loops > self.trained]
        if deeper:
            lowest = min(deeper, key=lambda row: row.score.accuracy)
            highest = max(deeper, key=lambda row: row.score.accuracy)
            helps = highest.score.interval[0] > at.score.interval[1]
            shown = highest if helps else lowest
            said.append(
                f"up to {deeper[-1].loops}: {'highest' if helps else 'lowest'} at {shown.loops}, "
                f"{_percent(shown.score)} ({_difference(shown.score, at.score)})"
            )
        if self.diagnosis is not None:
            said.append(f"the state is {self.diagnosis.kind}")
        return "; ".join(said)

    def as_dict(self) -> dict[str, Any]:
        return {
            "trained_loops": self.trained,
            "what": self.what,
            "guessed": self.guessed,
            "rows": [row.as_dict() for row in self.rows],
            "states": [asdict(state) for state in self.states],
            "diagnosis": asdict(self.diagnosis) if self.diagnosis else None,
            "verdict": self.verdict,
        }


def dial_counts(trained: int) -> list[int]:
    """Numbers of loops from 1 to four times the trained one, the trained one and half of it among them."""
    if BEYOND * trained <= 8:
        return list(range(1, BEYOND * trained + 1))
    shares = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, BEYOND)
    return sorted({1, trained // 2, *(max(1, round(share * trained)) for share in shares)})


def trained_depth(loaded: LoadedRun) -> int:
    """The number of loops a run counts as trained at: the model's own, or where loops are tied to the length of a
    sequence, the longest length."""
    return _longest(loaded) if _kind(loaded) == "permutations" else loaded.model.config.n_loops


def measure_dial(
    loaded: LoadedRun,
    *,
    counts: Sequence[int] | None = None,
    n: int,
    on_progress: Callable[[float], None] | None = None,
) -> Dial:
    """Quality with `n` questions a task or `n` sequences at every number of loops, `trained_depth` always among them;
    `on_progress` hears how many more loops are measured, of `dial_work` in all."""
    trained, model = trained_depth(loaded), loaded.model
    counts = sorted({*(counts or dial_counts(trained)), trained})

    def part(loops: float, n_parts: int) -> Callable[[int], None] | None:
        """What hears of one or more of the `n_parts` that `loops` are measured in."""
        return None if on_progress is None else lambda n_done: on_progress(n_done * loops / n_parts)

    batches, what = held_out_batches(_data(loaded)), f"{n} sequences of {trained} permutations, all positions right"
    kind = _kind(loaded)
    if kind == "reasoning":
        reasoner, questions = as_reasoner(loaded, run=loaded.path), held_out_questions(n)
        what = f"{n} held-out questions of each task, greedy, exact match"
    elif kind in TEXT_KINDS:
        what = f"held-out {'bytes' if kind == 'bytes' else 'tokens'}, the likeliest next one right"
    rows = []
    for count in counts:
        if kind == "reasoning":
            tasks = evaluate(reasoner, questions, n_loops=count, on_progress=part(count / 2, len(questions))).scores
            scores = [score for task, score in tasks.items() if task != FORMAT_TASK]
            score = Score(sum(each.n_right for each in scores), sum(each.n for each in scores))
        elif kind in TEXT_KINDS:
            score = next_token_score(model, batches, n_loops=count, on_batch=part(count / 2, len(batches)))
        else:
            rules, hear = [str(count)], part(count / 2, 1)
            stairs = evaluate_staircase(model, lengths=[trained], rules=rules, n_sequences=n, on_progress=hear)
            score = stairs[0].exact
        loss = held_out_loss(model, batches, n_loops=count, on_batch=part(count / 2, len(batches)))
        check_finite([loss], source=model.source)
        rows.append(DialRow(count, score, loss))
    deepest = _deepest(trained)
    states = follow_states(model, batches, n_loops=deepest, on_batch=part(deepest, len(batches)))
    guessed = GUESSED if kind == "reasoning" else 1 / permutations.N_ANSWERS**trained
    if kind in TEXT_KINDS:
        guessed = commonest_share(batches)
    return Dial(trained, what, rows, states, diagnose(states, trained=trained), guessed)


def dial_work(counts: Sequence[int], *, trained: int) -> int:
    """Loops that `measure_dial` measures at these counts, those of the states among them."""
    return sum({*counts, trained}) + _deepest(trained)


def _deepest(trained: int) -> int:
    """Loops over which the state is followed."""
    return max(BEYOND * trained, 4)


def held_out_batches(data: DataConfig, *, n_batches: int = N_BATCHES) -> list[Batch]:
    """Batches that training never sees, of the kind that `data` gives."""
    if isinstance(data, ReasoningConfig):
        source = ReasoningSource(ReasoningConfig(n_rows=8), seed=LOSS_SEED, held_out=True)
        return [source.batch(number) for number in range(n_batches)]
    if not isinstance(data, PermutationsConfig):
        text = held_out_text(data)
        return [text.batch(number) for number in range(min(text.n_held_out, MAX_TEXT_BATCHES))]
    rng = np.random.default_rng(LOSS_SEED)
    drawn = [permutations.sequences(rng, n_sequences=50, length=data.max_len) for _ in range(n_batches)]
    return [Batch(torch.from_numpy(ids), torch.from_numpy(answers)) for ids, answers in drawn]


@torch.inference_mode()
def held_out_loss(
    model: LoopedLM, batches: Sequence[Batch], *, n_loops: int, on_batch: Callable[[int], None] | None = None
) -> float:
    """Mean cross-entropy over the scored tokens of all batches, nats.

    Raises:
        DataError: no token is scored.
    """
    total, n_scored = 0.0, 0
    for batch in scored_batches(model, batches):
        hidden = model.hidden(batch.ids, plan=LoopPlan(n_loops), documents=batch.documents)
        scored = batch.targets != IGNORE
        n = int(scored.sum())
        total += n * float(model.cross_entropy(hidden[scored], batch.targets[scored]))
        n_scored += n
        if on_batch is not None:
            on_batch(1)
    return total / n_scored


def scored_batches(model: LoopedLM, batches: Sequence[Batch]) -> list[Batch]:
    """The batches that change a mean, on the model's device: the mean loss of no token at all would be NaN.

    Raises:
        DataError: no token of any batch is scored.
    """
    found = [batch.to(model.embed.weight.device) for batch in batches if bool((batch.targets != IGNORE).any())]
    if not found:
        raise DataError(
            "no token of the held-out data is scored, so nothing can be measured: hold out more text, or longer rows"
        )
    return found


def commonest_share(batches: Sequence[Batch]) -> float:
    """Share of the scored tokens that are the commonest one: what always guessing it would be right on."""
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in batches])
    return float(targets.bincount().max()) / len(targets)


def bits_per_byte(model: LoopedLM, batches: Sequence[Batch], token_bytes: NDArray[np.int64], *, n_loops: int) -> float:
    """Cross-entropy of text over its UTF-8 bytes, in bits: what models with other tokenizers can be held against.
    Tokens that stand for no byte (tags) are not scored."""
    n_bytes = torch.from_numpy(token_bytes)
    scored, total = [], 0
    for batch in batches:
        each = torch.where(batch.targets == IGNORE, 0, n_bytes[batch.targets.clamp(min=0)])
        total += int(each.sum())
        scored.append(replace(batch, targets=batch.targets.masked_fill(each == 0, IGNORE)))
    n_scored = sum(int((batch.targets != IGNORE).sum()) for batch in scored)
    nats = n_scored * held_out_loss(model, scored, n_loops=n_loops)  # refuses where nothing is scored
    return nats / math.log(2) / total


@torch.inference_mode()
def next_token_score(
    model: LoopedLM, batches: Sequence[Batch], *, n_loops: int, on_batch: Callable[[int], None] | None = None
) -> Score:
    """Scored tokens whose likeliest prediction is right, over all batches."""
    n_right, n = 0, 0
    for batch in scored_batches(model, batches):
        scored = batch.targets != IGNORE
        hidden = model.hidden(batch.ids, plan=LoopPlan(n_loops), documents=batch.documents)
        chosen = model.logits(hidden[scored])[:, : model.config.n_targets].argmax(-1)
        n_right += int((chosen == batch.targets[scored]).sum())
        n += int(scored.sum())
        if on_batch is not None:
            on_batch(1)
    return Score(n_right, n)


@torch.inference_mode()
def follow_states(
    model: LoopedLM, batches: Sequence[Batch], *, n_loops: int, on_batch: Callable[[int], None] | None = None
) -> list[StateAt]:
    """Size and relative change of the state loop by loop; fewer than n_loops where halting ends the loop."""
    counts: list[int] = []  # scored tokens, by which the batches are weighed
    squares: list[list[float]] = []
    changes: list[list[float]] = []
    for batch in scored_batches(model, batches):
        states: list[torch.Tensor] = []
        model.hidden(batch.ids, plan=LoopPlan(n_loops), documents=batch.documents, states=states)
        scored = batch.targets != IGNORE
        kept = [state[scored].float() for state in states]
        counts.append(len(kept[0]))
        squares.append([float(state.square().mean()) for state in kept])
        changes.append([float(relative_change(old, new).mean()) for old, new in pairwise(kept)])
        if on_batch is not None:
            on_batch(1)
    n_loops = min(map(len, squares))
    mean_norms = np.sqrt(np.average([square[:n_loops] for square in squares], axis=0, weights=counts))
    mean_changes = [None, *np.average([change[: n_loops - 1] for change in changes], axis=0, weights=counts)]
    return [
        StateAt(loop, float(norm), None if change is None else float(change))
        for loop, (norm, change) in enumerate(zip(mean_norms, mean_changes, strict=True), start=1)
    ]


def diagnose(states: Sequence[StateAt], *, trained: int) -> Diagnosis | None:
    """Settling, marginal or drifting, by the loops beyond the trained depth; None where fewer than two of them ran."""
    beyond = [state for state in states if state.loop > trained and state.change is not None]
    if len(beyond) < 2:
        return None
    first, last = beyond[0].change or 0.0, beyond[-1].change or 0.0
    rate = (last / first) ** (1 / (len(beyond) - 1)) if first > 0 else 0.0
    growth = beyond[-1].norm / states[trained - 1].norm
    kind: Kind = "marginal"
    if growth > MAX_GROWTH or (rate >= 1 and last > SETTLED_CHANGE):
        kind = "drifting"
    elif rate < SETTLING_RATE or last <= SETTLED_CHANGE:
        kind = "settling"
    return Diagnosis(kind, rate, last, growth)


def _data(loaded: LoadedRun) -> DataConfig:
    return parse_data(loaded.config["data"], source=str(loaded.path))


def _kind(loaded: LoadedRun) -> str:
    kind = loaded.config.get("data", {}).get("kind")
    if kind not in ("reasoning", "permutations", *TEXT_KINDS):
        raise CheckpointError(
            f"{loaded.path} was trained on {kind!r}; the loops suite measures runs of `looplm train` with reason, s3, "
            "text or pretrain"
        )
    return str(kind)


def _longest(loaded: LoadedRun) -> int:
    return int(loaded.config["data"]["max_len"])


def _loops(count: int) -> str:
    return f"{count} loop{'s' if count > 1 else ''}"


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(score: Score, other: Score) -> str:
    (low, high), (other_low, other_high) = score.interval, other.interval
    if low <= other_high and other_low <= high:
        return f"no difference that {score.n:,} answers show"
    points = 100 * (score.accuracy - other.accuracy)
    return f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
