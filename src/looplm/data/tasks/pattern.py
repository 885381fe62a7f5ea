"""`What comes next: {x1}, {x2}, {x3}, {x4}, ?` Five kinds of sequence, all terms in 0..9999.

The scratchpad names the rule and applies it. What the rule depends on is compared in writing first: the first term
with the third and the second with the fourth (alternating), the differences with the terms before them (a sum of the
last two) and with each other (arithmetic), the first term doubled, and doubled again, with the second (a ratio
of 2 to 5).
"""

import random

from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import align, compare, compute

NAME = "pattern"
TOP = 9999


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """One of the five kinds, uniformly; small terms up to 999."""
    return _solve(rng.choice(KINDS)(rng, 999 if small else TOP))


def sample_harder(rng: random.Random) -> Example:
    """Terms that leave 0..9999."""
    while True:
        terms = rng.choice(KINDS)(rng, 10 * TOP)
        if max(terms) > TOP:
            return _solve(terms)


def _magnitude(rng: random.Random, top: int) -> int:
    """A number of 0..top with a uniform number of digits half of the time: small numbers are what people ask about."""
    return rng.randint(0, top) if rng.random() < 0.5 else rng.randint(0, min(top, 10 ** rng.randint(1, 4) - 1))


def _arithmetic(rng: random.Random, top: int) -> list[int]:
    while True:
        start, step = _magnitude(rng, top), rng.choice((-1, 1)) * rng.randint(1, 20)
        terms = [start + index * step for index in range(5)]
        if min(terms) >= 0 and max(terms) <= top:
            return terms


def _geometric(rng: random.Random, top: int) -> list[int]:
    ratio = rng.randint(2, 5)
    start = rng.randint(1, top // ratio**4)
    return [start * ratio**index for index in range(5)]


def _alternating(rng: random.Random, top: int) -> list[int]:
    while True:
        first, second = _magnitude(rng, top), _magnitude(rng, top)
        if first != second:
            return [first, second, first, second, first]


def _squares(rng: random.Random, top: int) -> list[int]:
    root = rng.randint(0, int(top**0.5) - 4)
    return [(root + index) ** 2 for index in range(5)]


def _fibonacci(rng: random.Random, top: int) -> list[int]:
    while True:
        terms = [_magnitude(rng, top // 2), _magnitude(rng, top // 3)]
        while len(terms) < 5:
            terms.append(terms[-1] + terms[-2])
        if 0 < terms[-1] <= top:
            return terms


KINDS = (_arithmetic, _geometric, _alternating, _squares, _fibonacci)


def _solve(terms: list[int]) -> Example:
    first, second, third, fourth, answer = terms
    question = f"What comes next: {first}, {second}, {third}, {fourth}, ?"
    steps = _compared(first, third)
    if first == third:
        steps += _compared(second, fourth)
        if second == fourth:
            return Example(question, (*steps, "alternates", f"={answer}"), str(answer))
    early, late = compute(third, "-", second), compute(fourth, "-", third)
    steps += early.steps + late.steps
    if early.value < 0:  # of the five kinds only a falling arithmetic sequence gets here
        steps += ("same difference", *compute(fourth, "+", late.value).steps)
        return _checked(question, steps, answer)
    steps += _compared(second, late.value)
    if second == late.value:
        steps += _compared(first, early.value)
        if first == early.value:
            steps += ("sum of the last two", *compute(third, "+", fourth).steps)
            return _checked(question, steps, answer)
    steps += _compared(early.value, late.value)
    if early.value == late.value:
        steps += ("same difference", *compute(fourth, "+", late.value).steps)
    elif late.value == early.value + 2 == second - first + 4:
        grown = compute(late.value, "+", 2)
        steps += ("difference grows by 2", *grown.steps, *compute(fourth, "+", grown.value).steps)
    else:
        steps += _ratio_steps(first, second)
        ratio = second // first
        steps += (f"times {ratio}", *compute(fourth, "*", ratio).steps)
    return _checked(question, steps, answer)


def _checked(question: str, steps: tuple[str, ...], answer: int) -> Example:
    assert steps[-1] == f"={answer}", (question, steps)
    return Example(question, steps, str(answer))


def _ratio_steps(first: int, second: int) -> tuple[str, ...]:
    """Find a ratio of 2 to 5: the first term doubled, and doubled again, beside the second."""
    double = compute(first, "+", first)
    steps = double.steps + _compared(double.value, second)
    if double.value == second:
        return steps
    fourfold = compute(double.value, "+", double.value)
    return steps + fourfold.steps + _compared(fourfold.value, second)


def _compared(left: int, right: int) -> tuple[str, ...]:
    """Two numbers side by side at equal width, then how they compare."""
    a, b = align(left, right)
    return f"{a} {b}", compare(a, b)
