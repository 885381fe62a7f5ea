"""`Sort in ascending order: {list}` and descending.

The scratchpad sorts by one digit at a time from the left: each line keeps the columns sorted before it and orders the
next column within their groups, so every written digit needs a look at one group only.
"""

import random

from looplm.data.tasks.example import Example

NAME = "sorting"


def sample(rng: random.Random) -> Example:
    """3 to 8 numbers in 0..999."""
    return _sample(rng, rng.randint(3, 8))


def sample_harder(rng: random.Random) -> Example:
    """9 to 12 numbers."""
    return _sample(rng, rng.randint(9, 12))


def _sample(rng: random.Random, n_numbers: int) -> Example:
    numbers = [rng.randint(0, 999) for _ in range(n_numbers)]
    word = rng.choice(("ascending", "descending"))
    reverse = word == "descending"
    padded = [f"{number:03d}" for number in numbers]
    by_hundreds = sorted(padded, key=lambda text: text[:1], reverse=reverse)
    by_tens = sorted(by_hundreds, key=lambda text: text[:2], reverse=reverse)
    by_units = sorted(by_tens, reverse=reverse)
    steps = tuple(" ".join(line) for line in (padded, by_hundreds, by_tens, by_units))
    answer = " ".join(map(str, sorted(numbers, reverse=reverse)))
    return Example(f"Sort in {word} order: {' '.join(map(str, numbers))}", steps, answer)
