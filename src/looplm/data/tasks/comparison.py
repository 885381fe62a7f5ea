"""`Which is larger, {a} or {b}?` and smaller."""

import random

from looplm.data.tasks.even_odd import number_of_digits
from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import compare

NAME = "comparison"
WIDTH = 6  # every pair is written at this width, so that matching digits always stand the same distance apart


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """0..999999, digits uniform; half of the pairs share length and leading digits; small ones 1 or 2 digits."""
    return _sample(rng, low=1, high=2 if small else 6)


def sample_harder(rng: random.Random) -> Example:
    """7 to 9 digits."""
    return _sample(rng, low=7, high=9)


def _sample(rng: random.Random, *, low: int, high: int) -> Example:
    while True:
        digits = rng.randint(low, high)
        a = number_of_digits(rng, digits)
        if rng.random() < 0.5:
            n_shared = rng.randint(min(1, digits - 1), digits - 1)
            tail = 10 ** (digits - n_shared)
            b = a // tail * tail + rng.randrange(tail)
        else:
            b = number_of_digits(rng, rng.randint(low, high))
        if a != b and len(str(b)) in range(low, high + 1):
            break
    width = max(WIDTH, len(str(max(a, b))))
    left, right = f"{a:0{width}d}", f"{b:0{width}d}"
    word = rng.choice(("larger", "smaller"))
    answer = max(a, b) if word == "larger" else min(a, b)
    return Example(f"Which is {word}, {a} or {b}?", (left, right, compare(left, right)), str(answer))
