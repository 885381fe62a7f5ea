"""Scoring on the reasoning suite, or on anyone's questions: greedy decoding, exact match."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from looplm.checkpoint import LoadedRun, load_run
from looplm.data.tasks import REASONING
from looplm.data.tasks.example import Example, is_test_question
from looplm.data.tokenizer import EOS_ID
from looplm.errors import CheckpointError, ConfigError, DataError
from looplm.eval.interval import Score
from looplm.eval.lines import numbered_lines
from looplm.infer.decoders import EarlyExit
from looplm.infer.reasoner import MAX_NEW_TOKENS, Reasoner, Reply
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.reading import parse_json

EVAL_SEED = 20261121
MAX_BATCH = 250
CACHE_BYTES = 600_000_000  # of keys and values in one batch; deep plans and long prompts make smaller batches
FORMAT_TASK = "cot_format"
MOST_IN_VAIN = 100_000  # draws without a new question, after which a task counts as exhausted


@dataclass(frozen=True)
class Question:
    """A question with the task it is counted under and the expected answer."""

    task: str
    question: str
    answer: str


@dataclass
class Result:
    """Scores by task at one number of loops, and the wrong answers."""

    n_loops: int
    scores: dict[str, Score]
    mistakes: list[dict[str, str]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    """Of each question, in their order."""
    mean_loops: float = 0.0
    """Loops per generated token."""

    @property
    def mean_accuracy(self) -> float:
        """Mean over the answer tasks, without cot_format."""
        values = [score.accuracy for task, score in self.scores.items() if task != FORMAT_TASK]
        return sum(values) / len(values)


def load_reasoner(run: str | Path) -> Reasoner:
    """The reasoner of a run folder or of `builtin:reasoner`."""
    return as_reasoner(load_run(run), run=run)


def as_reasoner(loaded: LoadedRun, *, run: str | Path) -> Reasoner:
    """A loaded run as a reasoner, if it was trained on questions."""
    kind = loaded.config.get("data", {}).get("kind")
    if kind != "reasoning":
        raise CheckpointError(
            f"{str(run)!r} was trained on {kind!r}, which has no questions; give a run of `looplm train reason`"
        )
    return Reasoner(loaded.model)


def held_out_questions(n: int, *, harder: bool = False, seed: int = EVAL_SEED) -> list[Question]:
    """`n` different held-out questions of each task; `harder` takes them from beyond the trained ranges.

    Raises:
        ConfigError: a task has not so many of them.
    """
    questions = []
    for name, task in REASONING.items():
        rng = random.Random(f"eval {seed} {name} {harder}")
        draw: Callable[[random.Random], Example] = task.sample_harder if harder else task.sample
        seen: set[str] = set()
        n_in_vain = 0
        while len(seen) < n:
            example = draw(rng)
            if is_test_question(example.question) and example.question not in seen:
                seen.add(example.question)
                questions.append(Question(name, example.question, example.answer))
                n_in_vain = 0
            elif (n_in_vain := n_in_vain + 1) > MOST_IN_VAIN:
                raise ConfigError(f"task {name} has only about {len(seen):,} held-out questions, not {n:,}; ask fewer")
    return questions


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines of `{"task", "question", "answer"}`."""
    questions = []
    for number, line in numbered_lines(path, what="question file"):
        try:
            questions.append(_question(parse_json(line)))
        except ValueError as error:
            raise DataError(
                f'{path}, line {number}: expected {{"task": ..., "question": ..., "answer": ...}}, all non-empty, '
                f"got {_shortened(line)!r} ({error})"
            ) from None
    if not questions:
        raise DataError(f"question file {str(path)!r} holds no questions")
    return questions


def evaluate(
    reasoner: Reasoner,
    questions: Sequence[Question],
    *,
    n_loops: int | None = None,
    early: EarlyExit | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Score all questions, with the exits of `early` if given; `on_progress` is called with the number of newly scored
    ones."""
    if not questions:
        raise DataError("there is no question to score; give one or more")
    loops = LoopPlan(reasoner.model.config.n_loops if n_loops is None else n_loops).n_loops
    longest = _check_lengths(reasoner, questions)
    batch_size = rows_that_fit(reasoner.model, n_loops=loops, n_tokens=longest + MAX_NEW_TOKENS)
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    n_formed = 0
    mistakes = []
    is_right = [False] * len(questions)
    depths: list[int] = []
    # similar lengths together: a batch runs as long as its longest answer
    order = sorted(range(len(questions)), key=lambda index: (questions[index].task, len(questions[index].question)))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        n_ended = 0

        def hear(row: int, token: int) -> None:  # a batch takes seconds: say when an answer ends
            nonlocal n_ended
            if token == EOS_ID and on_progress is not None:
                n_ended += 1
                on_progress(1)

        asked = [questions[index].question for index in part]
        replies = reasoner.answer(asked, n_loops=loops, early=early, on_token=None if on_progress is None else hear)
        for index, reply in zip(part, replies, strict=True):
            question = questions[index]
            is_right[index] = reply.completion.answer == question.answer
            total[question.task] = total.get(question.task, 0) + 1
            right[question.task] = right.get(question.task, 0) + is_right[index]
            n_formed += reply.completion.well_formed
            depths += reply.generation.depths
            if not is_right[index]:
                mistakes.append(_mistake(question, reply))
        if on_progress is not None:
            on_progress(len(part) - n_ended)  # those that ended without the token for it
    tasks = list(dict.fromkeys(question.task for question in questions))
    scores = {task: Score(right[task], total[task]) for task in tasks}
    scores[FORMAT_TASK] = Score(n_formed, len(questions))
    return Result(loops, scores, mistakes, is_right, sum(depths) / max(1, len(depths)))


def _question(record: object) -> Question:
    """One record of a question file; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"the line is {type(record).__name__}, not an object")
    texts = {key: _text(record, key) for key in ("task", "question", "answer")}
    if texts["task"] == FORMAT_TASK:
        raise ValueError(f"{FORMAT_TASK} is counted over all tasks and cannot be one")
    return Question(**texts)


def _text(record: dict[str, object], key: str) -> str:
    """One field of a record as text; an answer may be written as a number."""
    if key not in record:
        raise ValueError(f"{key} is missing")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key} is {type(value).__name__}, not text")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{key} is empty")
    return text


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_lengths(reasoner: Reasoner, questions: Sequence[Question]) -> int:
    """Tokens of the longest prompt; one that leaves no room for an answer is refused before anything is scored."""
    longest, seq_len = 0, reasoner.model.config.seq_len
    for question in questions:
        n_tokens = len(reasoner.prompt_ids(question.question))
        if n_tokens >= seq_len:
            raise DataError(
                f"the question {question.question[:60]!r}... has {n_tokens} tokens and the model's context is "
                f"{seq_len}; shorten it or leave it out"
            )
        longest = max(longest, n_tokens)
    return longest


def rows_that_fit(model: LoopedLM, *, n_loops: int, n_tokens: int) -> int:
    """Rows of `n_tokens` whose cache stays within CACHE_BYTES, MAX_BATCH at most."""
    width = sum(heads * width for heads, width in model.config.block.attention.slot_shapes)
    per_token = model.n_slots(n_loops) * width * model.embed.weight.itemsize
    return max(1, min(MAX_BATCH, CACHE_BYTES // (per_token * min(n_tokens, model.config.seq_len))))


def _mistake(question: Question, reply: Reply) -> dict[str, str]:
    return {
        "task": question.task,
        "question": question.question,
        "expected": question.answer,
        "answer": reply.completion.answer or "",
        "text": reply.text,
    }
