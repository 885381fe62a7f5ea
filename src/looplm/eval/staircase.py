"""The loop staircase: exact-sequence accuracy on permutation tracking by length and number of loops."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from looplm.data.tasks import permutations
from looplm.errors import ConfigError, DataError
from looplm.eval.interval import Score
from looplm.infer.depth import mean_depth, score_sequences
from looplm.infer.exits import ExitRule
from looplm.infer.sampling import check_finite
from looplm.model.looped import LoopedLM

EVAL_SEED = 20261121
N_SEQUENCES = 200
BATCH_SIZE = 200
LENGTHS = (12, 24, 32, 48, 64)
LOOPS = ("n/2", "n", "1.5n", "2n")
EXPRESSION = re.compile(r"(?P<factor>\d+(?:\.\d+)?)?n(?:/(?P<divisor>[1-9]\d*))?(?:\+(?P<extra>\d+))?|(?P<fixed>\d+)")


@dataclass(frozen=True)
class Row:
    """One cell of the staircase."""

    length: int
    rule: str
    loops: int
    exact: Score
    mean_loops: float | None = None
    """Loops per token, where an exit rule let them stop."""

    def as_dict(self) -> dict[str, float | int | str]:
        low, high = self.exact.interval
        return {
            **({} if self.mean_loops is None else {"mean_loops": self.mean_loops}),
            "length": self.length,
            "loops": self.loops,
            "rule": self.rule,
            "exact": self.exact.accuracy,
            "n": self.exact.n,
            "low": low,
            "high": high,
        }


def loops_for(rule: str, length: int) -> int:
    """A number of loops from `12`, `n`, `n/2`, `1.5n` or `2n+4`, where n is the sequence length; halves round up."""
    match = EXPRESSION.fullmatch(rule.strip())
    if not match:
        raise ConfigError(f"loops {rule!r} is not a number or a rule such as n, n/2, 1.5n or 2n+4")
    if match["fixed"] is not None:
        loops = int(match["fixed"])
    else:
        scaled = float(match["factor"] or 1) * length / int(match["divisor"] or 1)
        loops = math.ceil(scaled) + int(match["extra"] or 0)
    if loops < 1:
        raise ConfigError(
            f"loops {rule!r} gives {loops} at length {length}; a looped model runs its core at least once"
        )
    return loops


def check_model(model: LoopedLM) -> None:
    """Refuse a model that does not read permutations."""
    if model.config.vocab_size != permutations.VOCAB_SIZE or model.config.d_head_out != permutations.N_ANSWERS:
        raise DataError("this model was not trained on permutations; give a run of `looplm train s3`")


def check_lengths(model: LoopedLM, lengths: Sequence[int]) -> None:
    """Refuse sequences that are no sequence or do not fit the model's context, before any is drawn."""
    most = model.config.seq_len - 1  # BOS stands before them
    for length in lengths:
        if not 1 <= length <= most:
            raise ConfigError(f"length {length} does not fit the model's context; give 1 to {most}")


@torch.inference_mode()
def evaluate_staircase(
    model: LoopedLM,
    *,
    lengths: Sequence[int] = LENGTHS,
    rules: Sequence[str] = LOOPS,
    n_sequences: int = N_SEQUENCES,
    seed: int = EVAL_SEED,
    exit_rule: ExitRule | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Every length with every rule, on the same fresh sequences of that length. A sequence counts when all its
    positions are right. With `exit_rule` the tokens stop when it fires, at the latest after the rule's loops."""
    check_model(model)
    check_lengths(model, lengths)
    if n_sequences < 1:
        raise ConfigError(f"{n_sequences} sequences show nothing; give 1 or more")
    rows, device = [], model.embed.weight.device
    for length in lengths:
        ids, answers = permutations.sequences(
            np.random.default_rng([seed, length]), n_sequences=n_sequences, length=length
        )
        for rule in rules:
            loops = loops_for(rule, length)
            mean_loops = None
            if exit_rule is None:
                batches = torch.from_numpy(ids).split(BATCH_SIZE)
                logits = torch.cat([model(batch.to(device), n_loops=loops).logits for batch in batches])
            else:
                scored = score_sequences(model, list(torch.from_numpy(ids)), n_loops=loops, rule=exit_rule)
                logits = torch.stack([each.logits for each in scored])
                mean_loops = mean_depth(scored)
            check_finite(logits.amax(-1).flatten().tolist(), source=model.source)
            n_right = int((logits[:, 1:].argmax(-1).cpu().numpy() == answers[:, 1:]).all(axis=1).sum())
            rows.append(Row(length, rule, loops, Score(n_right, n_sequences), mean_loops))
            if on_progress is not None:
                on_progress(1)
    return rows
