"""Two operations on numbers of 0..99, bracketed left, bracketed right, or by the usual precedence."""

import random

from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import compute

NAME = "two_step"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """Any ops of + - * with at most one *; small: one digit as often as two, so that numbers of unlike width meet."""
    while True:
        first, second = rng.choice("+-*"), rng.choice("+-*")
        if (first, second) != ("*", "*"):
            break
    a, b, c = (rng.randint(0, 9 if small and rng.random() < 0.5 else 99) for _ in range(3))
    form = rng.randrange(3)
    text = (f"({a} {first} {b}) {second} {c}", f"{a} {first} ({b} {second} {c})", f"{a} {first} {b} {second} {c}")[form]
    right_first = form == 1 or (form == 2 and second == "*")
    if right_first:
        inner = compute(b, second, c)
        outer = compute(a, first, inner.value)
    else:
        inner = compute(a, first, b)
        outer = compute(inner.value, second, c)
    return Example(f"What is {text}?", inner.steps + outer.steps, str(outer.value))


def sample_harder(rng: random.Random) -> Example:
    """Three operations of + and -, from left to right."""
    numbers = [rng.randint(0, 99) for _ in range(4)]
    ops = [rng.choice("+-") for _ in range(3)]
    text, value = str(numbers[0]), numbers[0]
    steps: tuple[str, ...] = ()
    for op, number in zip(ops, numbers[1:], strict=True):
        work = compute(value, op, number)
        text, value, steps = f"{text} {op} {number}", work.value, steps + work.steps
    return Example(f"What is {text}?", steps, str(value))
