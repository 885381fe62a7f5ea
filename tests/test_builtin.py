"""The reasoner that ships with the package."""

from importlib import resources
from pathlib import Path

import pytest
import torch

import looplm
from looplm.checkpoint import MODEL
from looplm.data.tasks import REASONING
from looplm.eval.reasoning import Question, evaluate, held_out_questions, load_reasoner
from looplm.infer.reasoner import Reasoner

FOLDER = Path(str(resources.files("looplm"))) / "builtin" / "reasoner"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return load_reasoner("builtin:reasoner")


def test_it_is_small_in_bf16_and_says_what_made_it() -> None:
    assert (FOLDER / MODEL).stat().st_size < 2_500_000
    assert "looplm train reason" in (FOLDER / "README.md").read_text()


def test_it_has_at_most_as_many_parameters_as_the_published_model() -> None:
    assert sum(p.numel() for p in looplm.load("builtin:reasoner").parameters()) <= 920_833


def test_it_answers_50_held_out_questions(reasoner: Reasoner) -> None:
    questions: list[Question] = held_out_questions(8, seed=50)[:50]
    assert len({question.task for question in questions}) == len(REASONING)
    result = evaluate(reasoner, questions)
    assert sum(score.n_right for task, score in result.scores.items() if task != "cot_format") >= 48, result.mistakes
    assert result.scores["cot_format"].n_right == 50


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 47 + 85?", "132"),
        ("Tom has 12 apples. He buys 7 more. How many apples does Tom have?", "19"),
        ("Sort in descending order: 9 120 33", "120 33 9"),
    ],
)
def test_it_answers_plain_and_wrapped_questions_alike(reasoner: Reasoner, question: str, answer: str) -> None:
    plain, wrapped = reasoner.answer([question, f"<INST>{question}</INST>"])
    assert plain.completion.answer == wrapped.completion.answer == answer
    assert plain.completion.steps


@torch.inference_mode()
def test_its_answers_are_the_same_alone_in_a_batch_and_without_cache(reasoner: Reasoner) -> None:
    questions = [question.question for question in held_out_questions(2, seed=9)]
    together = reasoner.answer(questions)
    for question, reply in zip(questions[::3], together[::3], strict=True):
        assert reasoner.answer([question])[0].generation == reply.generation
        ids = reasoner.prompt_ids(question)
        full = reasoner.model(torch.tensor([ids + reply.generation.ids])).logits[0, len(ids) - 1 : -1]
        assert full.argmax(-1).tolist() == reply.generation.ids
