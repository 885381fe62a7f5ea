"""What is said of a model that has shown nothing: no promise and no verdict."""

from collections.abc import Callable

import pytest
import torch

from looplm.errors import ConfigError, DataError
from looplm.eval import reasoning
from looplm.eval.exits import Trials, calibrate, check_worth_keeping
from looplm.eval.interval import Score
from looplm.eval.loops import Dial, DialRow
from looplm.eval.reasoning import evaluate, held_out_questions
from looplm.eval.staircase import evaluate_staircase
from looplm.infer.exits import ExitRule
from looplm.infer.reasoner import Reasoner
from looplm.model.looped import LoopedLM

S3 = ["vocab_size=7", "tied_head=false", "n_outputs=6"]


class Scripted(Trials):
    """Questions of which the first `n_right` are always answered right."""

    def __init__(self, n_right: int, n: int) -> None:
        self.n_right, self.n_runs = n_right, 0
        super().__init__(n)

    def _right(self, rule: ExitRule) -> tuple[torch.Tensor, float]:
        self.n_runs += 1
        return torch.arange(self.n) < self.n_right, 10.0


@pytest.mark.parametrize("n_right", [0, 10, 240])
def test_no_rule_is_promised_to_keep_an_accuracy_that_is_not_there(n_right: int) -> None:
    trials = Scripted(n_right, 1000)
    with pytest.raises(ConfigError, match=rf"right on {n_right} of 1,000 .*train the model") as refused:
        calibrate(trials, kind="latent", max_loss=0.02, confidence=0.95)
    assert "\n" not in str(refused.value)
    assert trials.n_runs == 1  # nothing but full depth


def test_a_loss_of_most_of_the_accuracy_is_no_promise() -> None:
    with pytest.raises(ConfigError, match=r"30\.0 %.*more than half of it: give a --max-loss of at most 0\.15"):
        check_worth_keeping(Score(300, 1000), max_loss=0.2)
    check_worth_keeping(Score(300, 1000), max_loss=0.15)


def test_nothing_follows_about_loops_where_none_beats_guessing() -> None:
    def verdict(*right: int) -> str:
        rows = [DialRow(loops, Score(each, 700), 0.0) for loops, each in zip((1, 2, 8), right, strict=True)]
        return Dial(2, "questions", rows, guessed=1 / 7).verdict

    assert "no number of loops is shown to do better than guessing (14.3 %)" in verdict(0, 100, 110)
    assert "no difference" not in verdict(0, 100, 110)
    assert "half of them" in verdict(0, 100, 200)


def test_nothing_is_scored_from_no_questions_or_sequences(make_model: Callable[..., LoopedLM]) -> None:
    with pytest.raises(DataError, match="no question to score"):
        evaluate(Reasoner(make_model()), [])
    model = make_model(*S3)
    with pytest.raises(ConfigError, match="0 sequences show nothing"):
        evaluate_staircase(model, n_sequences=0, lengths=[2])
    for length in (0, 64, 10**12):
        with pytest.raises(ConfigError, match=rf"length {length} does not fit the model's context; give 1 to 63"):
            evaluate_staircase(model, lengths=[2, length])


def test_more_questions_than_a_task_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "MOST_IN_VAIN", 100)
    monkeypatch.setattr(reasoning, "REASONING", {"even_odd": reasoning.REASONING["even_odd"]})
    with pytest.raises(ConfigError, match=r"task even_odd has only about [0-9,]+ held-out questions, not 90,000"):
        held_out_questions(90_000)
