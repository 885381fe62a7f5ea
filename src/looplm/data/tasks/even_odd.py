"""`Is {n} even or odd?`"""

import random

from looplm.data.tasks.example import Example

NAME = "even_odd"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """1 to 6 digits, the number of digits uniform; small ones 1 or 2."""
    return _example(number_of_digits(rng, rng.randint(1, 2 if small else 6)))


def sample_harder(rng: random.Random) -> Example:
    """7 to 9 digits."""
    return _example(number_of_digits(rng, rng.randint(7, 9)))


def number_of_digits(rng: random.Random, digits: int) -> int:
    """A uniform number with exactly this many digits; 0 counts as having one."""
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _example(n: int) -> Example:
    return Example(f"Is {n} even or odd?", (f"ends in {n % 10}",), "odd" if n % 2 else "even")
