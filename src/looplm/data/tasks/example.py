"""What a task produces, the one text format of the suite, and the train / test split (spec reasoning_tasks, v1)."""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Protocol

# One non-empty step or more, each without "<", then the answer. Anchored: nothing may stand before or after.
COMPLETION = re.compile(r"<THINK>((?:<STEP>[^<]+)+)</THINK><ANS>([^<]*)</ANS><EOS>")

PROMPT_TAGS = ("<INST>", "</INST>")


@dataclass(frozen=True)
class Example:
    """One question with a worked solution."""

    question: str
    steps: tuple[str, ...]
    answer: str


class Task(Protocol):
    """A module of this package: one kind of question."""

    NAME: str

    def sample(self, rng: random.Random, *, small: bool = False) -> Example:
        """One question from the range of the task; a small one from its low end, which a uniform draw seldom visits."""
        ...

    def sample_harder(self, rng: random.Random) -> Example:
        """One question from beyond the range: measured, never trained on."""
        ...


def render_prompt(question: str) -> str:
    """The prompt a question is wrapped in."""
    return question.join(PROMPT_TAGS)


def render_completion(example: Example) -> str:
    """The text a model is trained to continue the prompt with."""
    steps = "".join(f"<STEP>{step}" for step in example.steps)
    return f"<THINK>{steps}</THINK><ANS>{example.answer}</ANS><EOS>"


@dataclass(frozen=True)
class Completion:
    """A completion taken apart. `answer` is None where the text has no closed answer."""

    steps: tuple[str, ...]
    answer: str | None
    well_formed: bool


def parse_completion(text: str) -> Completion:
    """Read a generated completion. A malformed one still yields the steps and the answer that can be found in it."""
    match = COMPLETION.fullmatch(text)
    if match:
        return Completion(tuple(match[1].split("<STEP>")[1:]), match[2].strip(), True)
    thought = text.partition("</THINK>")[0].removeprefix("<THINK>")
    answer = re.search(r"<ANS>(.*?)</ANS>", text, re.DOTALL)
    steps = tuple(step for step in thought.split("<STEP>")[1:] if step)
    return Completion(steps, answer[1].strip() if answer else None, False)


def is_test_question(question: str) -> bool:
    """One question in ten is held out, by the hash of its text: the same ten percent in every run and every program."""
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) % 10 == 0
