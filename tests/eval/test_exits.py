"""Calibration: the bound by its definition, thresholds from the strictest on, the promise kept on what is stored."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm.checkpoint import MODEL
from looplm.errors import CheckpointError, ConfigError, DataError
from looplm.eval import exits
from looplm.eval.exits import (
    SequenceTrials,
    Trial,
    Trials,
    as_calibration,
    calibrate,
    check_promise,
    load_exit,
    upper_bound,
    weights_name,
)
from looplm.eval.interval import Score
from looplm.eval.staircase import evaluate_staircase
from looplm.infer.decoders import EarlyExit
from looplm.infer.exits import ExitRule
from looplm.model.looped import LoopedLM

S3 = ["vocab_size=7", "tied_head=false", "n_outputs=6", "inject.kind=diagonal"]


@pytest.mark.parametrize(("n_hits", "n"), [(0, 600), (1, 40), (7, 1000), (39, 40)])
def test_the_bound_is_where_so_few_hits_become_unlikely(n_hits: int, n: int) -> None:
    p = upper_bound(n_hits, n, confidence=0.95)
    at_most = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n_hits + 1))
    assert at_most == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(n, n, confidence=0.95) == 1


def test_what_is_asked_for_is_just_enough() -> None:
    with pytest.raises(ConfigError, match="give --n 598 or more"):
        check_promise(597, max_loss=0.005, confidence=0.95)
    check_promise(598, max_loss=0.005, confidence=0.95)
    assert upper_bound(0, 598, confidence=0.95) <= 0.005 < upper_bound(0, 597, confidence=0.95)


class Scripted(Trials):
    """Trials whose outcome is written down: broken sequences by threshold."""

    def __init__(self, broken: dict[float, int]) -> None:
        self.broken = {0.0: 0, **broken}
        self.asked: list[float] = []
        super().__init__(1000)
        self.asked.clear()

    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        self.asked.append(rule.threshold)
        right = torch.arange(self.n) >= self.broken.get(rule.threshold, 0)
        return right, 10.0 if rule.threshold else 20.0


def test_the_loosest_before_the_first_failure_is_chosen() -> None:
    trials = Scripted({exits.GRID[3]: 1, exits.GRID[4]: 30})  # later thresholds would pass again: they are not asked
    tried, best = calibrate(trials, kind="latent", max_loss=0.01, confidence=0.95)
    assert trials.asked == list(exits.GRID[:5])
    assert [trial.rule.threshold for trial in tried] == trials.asked
    assert best.rule == ExitRule("latent", exits.GRID[3])
    assert best.bound(0.95) <= 0.01
    assert best.saved == 0.5


def test_a_promise_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"even latent:0\.0001 breaks 50 of 1000"):
        calibrate(Scripted({exits.GRID[0]: 50}), kind="latent", max_loss=0.005, confidence=0.95)
    with pytest.raises(ConfigError, match="give --n 29956 or more"):
        calibrate(Scripted({}), kind="latent", max_loss=0.0001, confidence=0.95)


def test_trials_compare_with_full_depth_on_the_same_sequences(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model(*S3)
    trials = SequenceTrials(model, lengths=[2, 3], loops="2n", n_sequences=20, seed=1, batch_size=7)
    assert trials.full_loops == pytest.approx((3 * 4 + 4 * 6) / 7)  # BOS counts as a token
    never = trials.run(ExitRule("latent", 0))
    assert (never.n_broken, never.mean_loops, never.exact) == (0, trials.full_loops, never.full)
    soon = trials.run(ExitRule("latent", 1e6))
    assert soon.mean_loops == 2
    trials.full[:] = True  # as if full depth were always right
    assert trials.run(ExitRule("latent", 1e6)).n_broken == 20 - soon.exact.n_right
    with pytest.raises(DataError, match="not trained on permutations"):
        SequenceTrials(make_model(), lengths=[2], loops="n", n_sequences=2, seed=1)


def test_the_staircase_counts_the_loops_that_tokens_ran(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model(*S3)
    plain = evaluate_staircase(model, lengths=[4], rules=["n"], n_sequences=30)
    (never,) = evaluate_staircase(model, lengths=[4], rules=["n"], n_sequences=30, exit_rule=ExitRule("latent", 0))
    assert never == replace(plain[0], mean_loops=4.0)
    assert never.as_dict()["mean_loops"] == 4.0
    assert "mean_loops" not in plain[0].as_dict()


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="looplm calibrate"):
        load_exit(tmp_path)
    trial = Trial(ExitRule("kl", 0.002), Score(999, 1000), Score(1000, 1000), 1, 7.5, 20.0)
    promise: dict[str, Any] = {"max_loss": 0.005, "confidence": 0.95, "missing": "last", "asked": "x"}
    (tmp_path / MODEL).touch()
    as_calibration(trial, **promise, weights=weights_name(tmp_path)).save(tmp_path)
    assert load_exit(tmp_path) == EarlyExit(trial.rule, "last")
    assert json.loads((tmp_path / exits.FILE).read_text())["bound"] == upper_bound(1, 1000, confidence=0.95)
    as_calibration(trial, **promise, weights="step-00000010").save(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of step-00000010 and the run is at others.*calibrate again"):
        load_exit(tmp_path)
    (tmp_path / exits.FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is not a calibration"):
        load_exit(tmp_path)
