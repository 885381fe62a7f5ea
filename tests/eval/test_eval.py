import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from looplm.data.tasks.example import is_test_question
from looplm.errors import ConfigError, DataError
from looplm.eval.interval import Score
from looplm.eval.plots import comparison_plot, loops_plot, loss_plot, staircase_plot
from looplm.eval.reasoning import Question, evaluate, held_out_questions, read_questions
from looplm.eval.report import Report
from looplm.eval.staircase import evaluate_staircase, loops_for
from looplm.infer.engine import Generation
from looplm.infer.reasoner import Reasoner, Reply
from looplm.model.looped import LoopedLM


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    # Newcombe (1998), table I, Wilson without continuity correction; and 500 of 500
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (500, 500, 0.9924, 1.0),
    ],
)
def test_wilson_interval(n_right: int, n: int, low: float, high: float) -> None:
    assert Score(n_right, n).interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("rule", "loops"),
    [("7", 7), ("n", 12), ("n/2", 6), ("1.5n", 18), ("n/5", 3), ("2n", 24), ("2n+4", 28), (" n+1 ", 13)],
)
def test_loop_rules(rule: str, loops: int) -> None:
    assert loops_for(rule, 12) == loops


@pytest.mark.parametrize("rule", ["", "m", "n*2", "-3", "0", "n/0", "1.5", "n2", "0n"])
def test_wrong_loop_rules_are_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="loops"):
        loops_for(rule, 12)


def test_held_out_questions_are_test_questions_different_and_the_same_every_time() -> None:
    questions = held_out_questions(40)
    assert all(is_test_question(question.question) for question in questions)
    assert len({(question.task, question.question) for question in questions}) == 280
    assert questions == held_out_questions(40)
    assert questions != held_out_questions(40, seed=1)
    assert not {q.question for q in questions} & {q.question for q in held_out_questions(40, harder=True)}


class Scripted(Reasoner):
    """Answers from a table, so that scoring is tested on its own."""

    def __init__(self, table: dict[str, str]) -> None:
        super().__init__(LoopedLM(tiny_config()))
        self.table = table

    def answer(self, questions: list[str], **options: object) -> list[Reply]:  # type: ignore[override]
        from looplm.data.tasks.example import parse_completion

        texts = [self.table[question] for question in questions]
        return [Reply(parse_completion(text), text, Generation([], "eos", [])) for text in texts]


def test_scoring_counts_exact_answers_and_formats_apart() -> None:
    table = {
        "q1": "<THINK><STEP>s</THINK><ANS>1</ANS><EOS>",
        "q2": "<THINK><STEP>s</THINK><ANS> 2 </ANS><EOS>",
        "q3": "<THINK></THINK><ANS>3</ANS><EOS>",
        "q4": "<THINK><STEP>s</THINK><ANS>40</ANS><EOS>",
        "q5": "<THINK><STEP>s",
    }
    questions = [Question("a" if n < 4 else "b", f"q{n}", str(n)) for n in range(1, 6)]
    result = evaluate(Scripted(table), questions)
    assert result.scores == {"a": Score(3, 3), "b": Score(0, 2), "cot_format": Score(3, 5)}
    assert result.mean_accuracy == pytest.approx(0.5)
    assert [(m["question"], m["answer"]) for m in result.mistakes] == [("q4", "40"), ("q5", "")]


def test_question_files_are_read_and_wrong_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"task": "mine", "question": "What is 1 + 1?", "answer": 2}\n\n')
    assert read_questions(path) == [Question("mine", "What is 1 + 1?", "2")]
    path.write_text('{"task": "mine", "question": "x", "answer": "2"}\n{"task": "mine"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(path)
    with pytest.raises(DataError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")


def test_staircase_scores_whole_sequences(make_model: Callable[..., LoopedLM]) -> None:
    config = ["vocab_size=7", "tied_head=false", "n_outputs=6"]
    rows = evaluate_staircase(make_model(*config), lengths=[2, 5], rules=["n", "2n"], n_sequences=30)
    assert [(row.length, row.loops) for row in rows] == [(2, 2), (2, 4), (5, 5), (5, 10)]
    assert all(row.exact.n == 30 and row.exact.accuracy < 0.5 for row in rows)

    model_config = make_model(*config).config

    class Perfect(torch.nn.Module):
        config, source = model_config, "a model that is always right"
        embed = torch.nn.Embedding(7, 1)

        def forward(self, ids: torch.Tensor, *, n_loops: int) -> object:
            from looplm.data.tasks.permutations import PRODUCT

            products = [ids[:, 1] - 1]
            for position in range(2, ids.shape[1]):
                products.append(torch.from_numpy(PRODUCT)[products[-1], ids[:, position] - 1])
            logits = torch.nn.functional.one_hot(torch.stack([products[0], *products], dim=1), 6).float()
            return type("Out", (), {"logits": logits})

    perfect = evaluate_staircase(Perfect(), lengths=[7], rules=["n"], n_sequences=20)  # type: ignore[arg-type]
    assert perfect[0].exact == Score(20, 20)
    assert json.dumps(perfect[0].as_dict())


def test_staircase_refuses_other_models(make_model: Callable[..., LoopedLM]) -> None:
    with pytest.raises(DataError, match="not trained on permutations"):
        evaluate_staircase(make_model())


def test_plots_and_report_are_written(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("vocab_size=7", "tied_head=false", "n_outputs=6")
    rows = evaluate_staircase(model, lengths=[2, 4], rules=["n", "1"], n_sequences=10)
    scores = {"sorting": Score(3, 4), "pattern": Score(0, 4)}
    plots = [
        staircase_plot({"looped": rows, "other": rows}),
        loops_plot({1: scores, 2: scores}, trained="2"),
        comparison_plot({"card": {"sorting": 0.1, "pattern": 0.0}, "ours": scores}),
        loss_plot([{"seconds": 1.0, "loss": 2.0}, {"seconds": 2.0, "loss": 1.0}]),
    ]
    report = Report("a <b>")
    for plot in plots:
        assert plot.startswith(b"\x89PNG")
        report.image(plot, alt="a plot")
    report.scores({"card": {"sorting": 0.1}, "ours": scores})
    report.example("What is 1 < 2?", ["step"], "yes")
    page = report.html()
    assert "a &lt;b&gt;" in page
    assert "What is 1 &lt; 2?" in page
    assert page.count("data:image/png;base64,") == 4
