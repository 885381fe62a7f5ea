"""`What is {a} + {b}?`, `-` and `*`."""

import random

from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import compute

NAME = "arithmetic"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """+ and -: operands 0..999; *: operands 0..99; small ones 0..19."""
    op = rng.choice("+-*")
    top = 19 if small else 99 if op == "*" else 999
    return _example(rng.randint(0, top), op, rng.randint(0, top))


def sample_harder(rng: random.Random) -> Example:
    """Operands of 4 and 5 digits."""
    digits = rng.choice((4, 5))
    low, high = 10 ** (digits - 1), 10**digits - 1
    return _example(rng.randint(low, high), rng.choice("+-*"), rng.randint(low, high))


def _example(left: int, op: str, right: int) -> Example:
    work = compute(left, op, right)
    return Example(f"What is {left} {op} {right}?", work.steps, str(work.value))
