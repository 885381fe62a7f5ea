"""Every task against an independent reading of its own questions."""

import random
import re
from collections import Counter
from string import ascii_lowercase

import pytest

from looplm.data.tasks import REASONING, pattern, permutations, sorting, word_problem
from looplm.data.tasks.example import (
    Example,
    Task,
    is_test_question,
    parse_completion,
    render_completion,
    render_prompt,
)
from looplm.data.tasks.scratchpad import compute

N = 400


def examples(task: Task, *, harder: bool = False) -> list[Example]:
    rng = random.Random(3)
    return [task.sample_harder(rng) if harder else task.sample(rng) for _ in range(N)]


def solve(question: str) -> str:
    """Answer a question from its text alone, sharing no code with the generators."""
    if match := re.fullmatch(r"What is (.+)\?", question):
        assert re.fullmatch(r"[\d+*() -]+", match[1])
        return str(eval(match[1]))  # digits and operators only, checked above
    if match := re.fullmatch(r"Is (\d+) even or odd\?", question):
        return "even" if match[1][-1] in "02468" else "odd"
    if match := re.fullmatch(r"Which is (larger|smaller), (\d+) or (\d+)\?", question):
        return str({"larger": max, "smaller": min}[match[1]](int(match[2]), int(match[3])))
    if match := re.fullmatch(r"Sort in (ascending|descending) order: ([\d ]+)", question):
        return " ".join(map(str, sorted(map(int, match[2].split()), reverse=match[1] == "descending")))
    match = re.fullmatch(r"What comes next: (\d+), (\d+), (\d+), (\d+), \?", question)
    assert match, question
    a, b, c, d = map(int, match.groups())
    answers = set()
    if a == c and b == d:
        answers.add(a)
    if b - a == c - b == d - c:
        answers.add(d + d - c)
    if a and b % a == 0 and c == b * (b // a) and d == c * (b // a):
        answers.add(d * (b // a))
    root = round(a**0.5)
    if (a, b, c, d) == tuple((root + i) ** 2 for i in range(4)):
        answers.add((root + 4) ** 2)
    if c == a + b and d == b + c and len(answers) == 0:
        answers.add(c + d)
    if c == a + b and d == b + c and a == b:
        answers = {c + d}  # x x 2x 3x continues the sum, whatever else it looks like
    assert len(answers) == 1, (question, answers)
    return str(answers.pop())


@pytest.mark.parametrize("harder", [False, True], ids=["in range", "harder"])
@pytest.mark.parametrize("name", [name for name in REASONING if name != "word_problem"])
def test_answers_are_right(name: str, harder: bool) -> None:
    for example in examples(REASONING[name], harder=harder):
        assert example.answer == solve(example.question)


@pytest.mark.parametrize("harder", [False, True], ids=["in range", "harder"])
def test_word_problem_answers_follow_from_their_numbers_and_operations(harder: bool) -> None:
    patterns = [
        (
            ops,
            re.compile(
                re.sub(r"\\\{([abc])\\\}", r"(?P<\1>\\d+)", re.sub(r"\\\{[nmso]\\\}", r"\\w+", re.escape(text)))
            ),
        )
        for ops, text in word_problem.TEMPLATES
    ]
    for example in examples(word_problem, harder=harder):
        found = [(ops, match) for ops, each in patterns if (match := each.fullmatch(example.question))]
        assert len({ops for ops, _ in found}) == 1, (example.question, found)
        ops, match = found[0]
        value = int(match["a"])
        for op, key in zip(ops, "bc", strict=False):
            number = int(match[key])
            value = {"+": value + number, "-": value - number, "*": value * number}[op]
            assert value >= 0
        assert example.answer == str(value)


def test_word_problems_have_the_templates_names_and_objects_the_format_asks_for() -> None:
    assert len(word_problem.TEMPLATES) >= 24
    assert len(set(word_problem.NAMES)) >= 20
    assert len(set(word_problem.OBJECTS)) >= 20
    asked = [example.question for example in examples(word_problem)]
    assert any(re.fullmatch(r"\w+ has \d+ \w+\. \w+ buys \d+ more\. How many \w+ does \w+ have\?", q) for q in asked)


@pytest.mark.parametrize("name", REASONING)
def test_steps_are_non_empty_and_hold_no_tag_and_completions_parse_back(name: str) -> None:
    for example in examples(REASONING[name]):
        assert example.steps
        assert all(step and "<" not in step for step in example.steps)
        parsed = parse_completion(render_completion(example))
        assert parsed.well_formed
        assert (parsed.steps, parsed.answer) == (example.steps, example.answer)


def test_ranges_are_the_formats() -> None:
    for example in examples(REASONING["arithmetic"]):
        a, op, b = re.fullmatch(r"What is (\d+) (.) (\d+)\?", example.question).groups()  # type: ignore[union-attr]
        assert max(int(a), int(b)) <= (99 if op == "*" else 999)
    for example in examples(REASONING["two_step"]):
        assert example.question.count("*") <= 1
        assert max(map(int, re.findall(r"\d+", example.question))) <= 99
    lengths = Counter(len(e.question.split(": ")[1].split()) for e in examples(REASONING["sorting"]))
    assert set(lengths) == set(range(3, 9))
    for example in examples(REASONING["pattern"]):
        assert 0 <= int(example.answer) <= pattern.TOP
    pairs = [re.findall(r"\d+", e.question) for e in examples(REASONING["comparison"])]
    near = sum(len(a) == len(b) and (len(a) == 1 or a[0] == b[0]) for a, b in pairs) / len(pairs)
    assert 0.45 < near < 0.7


def test_sorting_merges_neighbouring_runs_until_one_is_left() -> None:
    rng = random.Random(3)
    for example in [*examples(sorting), *(sorting.sample_harder(rng) for _ in range(50))]:
        numbers = [f"{int(number):03d}" for number in example.question.split(": ")[1].split()]
        reverse = "descending" in example.question
        lines = [[re.findall(r"(\d{3})([a-z])", run) for run in step.split("|")] for step in example.steps]
        assert example.steps[0] == "list " + "".join(a + b for a, b in zip(numbers, ascii_lowercase, strict=False))
        assert [len(line) for line in lines[1:]] == [-(-len(numbers) // 2**n) for n in range(1, len(lines))]
        runs = [[item] for item in lines[0][0]]
        for line in lines[1:]:
            for number, run in enumerate(line):
                both = [item for part in runs[2 * number : 2 * number + 2] for item in part]
                assert run == sorted(both, key=lambda item: int(item[0]), reverse=reverse)
            runs = line
        assert [str(int(digits)) for digits, _ in runs[0]] == example.answer.split()


def test_pattern_takes_every_kind_and_negative_steps() -> None:
    written = [" ".join(e.steps) for e in examples(pattern)]
    for sign in ("alternates", "same difference", "grows by 2", "sum of the last two", "times"):
        assert sum(sign in text for text in written) > N / 10
    assert any("smaller" in text and "same difference" in text for text in written)


@pytest.mark.parametrize("left", [-4321, -57, -1, 0, 6, 48, 999])
@pytest.mark.parametrize("right", [-777, -20, 0, 9, 35, 1000])
@pytest.mark.parametrize("op", "+-*")
def test_scratchpads_compute(left: int, right: int, op: str) -> None:
    work = compute(left, op, right)
    expected = {"+": left + right, "-": left - right, "*": left * right}[op]
    assert work.value == expected
    assert work.steps[-1] == f"={expected}"
    for step in work.steps:  # every written equation between plain sums and products is true
        before, _, after = step.rpartition("=")
        if before and re.fullmatch(r"[\d+*-]+", before) and after.isdigit():
            assert eval(re.sub(r"\b0+(\d)", r"\1", before)) == int(after), step


def test_the_split_is_by_hash_and_one_in_ten() -> None:
    assert [q for q in ("a", "b", "c", "d", "e", "f", "g", "h") if is_test_question(q)] == ["a", "f"]
    held_out = sum(is_test_question(f"What is {a} + {b}?") for a in range(60) for b in range(60)) / 3600
    assert 0.08 < held_out < 0.12


def test_prompt_format() -> None:
    assert render_prompt("Is 4 even or odd?") == "<INST>Is 4 even or odd?</INST>"


@pytest.mark.parametrize(
    "text",
    [
        "<THINK></THINK><ANS>1</ANS><EOS>",
        "<THINK><STEP></THINK><ANS>1</ANS><EOS>",
        "<THINK><STEP>a<STEP></THINK><ANS>1</ANS><EOS>",
        "<THINK><STEP>a</THINK><ANS>1</ANS>",
        "<THINK>x<STEP>a</THINK><ANS>1</ANS><EOS>",
        "<THINK><STEP>a</THINK> <ANS>1</ANS><EOS>",
        "<THINK><STEP>a</THINK><ANS>1</ANS><EOS><EOS>",
    ],
)
def test_malformed_completions_are_told_apart_but_their_answer_is_read(text: str) -> None:
    parsed = parse_completion(text)
    assert not parsed.well_formed
    assert parsed.answer == "1"


def test_permutations_are_products_from_the_left() -> None:
    import numpy as np

    ids, answers = permutations.sequences(np.random.default_rng(0), n_sequences=50, length=9)
    for row, expected in zip(ids, answers, strict=True):
        assert row[0] == permutations.BOS_ID
        objects = (0, 1, 2)
        for token, answer in zip(row[1:], expected[1:], strict=True):
            element = permutations.ELEMENTS[token - 1]
            objects = tuple(element[place] for place in objects)
            assert permutations.ELEMENTS[answer] == objects
