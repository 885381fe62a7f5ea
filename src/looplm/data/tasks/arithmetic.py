"""`What is {a} + {b}?`, `-` and `*`."""

import random

from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import compute

NAME = "arithmetic"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """+ and -: operands 0..999; *: operands 0..99. Small: one digit as often as two or three, for each by itself, so
    that numbers of unlike width meet."""
    op = rng.choice("+-*")
    n_digits = 2 if op == "*" else 3
    left, right = (rng.randint(0, 10 ** (rng.randint(1, n_digits) if small else n_digits) - 1) for _ in range(2))
    return _example(left, op, right)


def sample_harder(rng: random.Random) -> Example:
    """Operands of 4 and 5 digits."""
    digits = rng.choice((4, 5))
    low, high = 10 ** (digits - 1), 10**digits - 1
    return _example(rng.randint(low, high), rng.choice("+-*"), rng.randint(low, high))


def _example(left: int, op: str, right: int) -> Example:
    work = compute(left, op, right)
    return Example(f"What is {left} {op} {right}?", work.steps, str(work.value))
