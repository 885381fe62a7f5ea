"""`Sort in ascending order: {list}` and descending.

The scratchpad is a merge sort in which every number carries a letter: `list 995a961b582c`, then every line merges its
neighbouring runs two by two until one is left, as `961b995a|582c`, `582c961b995a`. A digit is chosen between the heads
of two runs, not among all numbers, which is what sorting by columns asked for (docs/log.md, 2026-11-25). The
letter stands behind its number: digits stay together for copying, what was copied last is known by one token where
several numbers begin alike, and no space is needed.
"""

import random
from string import ascii_lowercase

from looplm.data.tasks.example import Example

NAME = "sorting"

Item = tuple[str, str]  # three digits and a letter


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """3 to 8 numbers in 0..999. A small one is 8 of them, or of a narrow window, where many begin alike, or of two to
    four different digits, where many have digits in common: the mistakes are numbers taken for one another."""
    n_numbers = rng.randint(3, 8)
    if not small:
        return _sorted(rng, _uniform(rng, n_numbers))
    kind = rng.choice(("most", "window", "digits", "digits"))
    if kind == "most":
        return _sorted(rng, _uniform(rng, 8))
    if kind == "window":
        window = rng.choice((20, 60))
        low = rng.randint(0, 999 - window)
        return _sorted(rng, _uniform(rng, n_numbers, low=low, high=low + window))
    digits = rng.sample("0123456789", rng.randint(2, 4))
    return _sorted(rng, [int("".join(rng.choices(digits, k=3))) for _ in range(n_numbers)])


def sample_harder(rng: random.Random) -> Example:
    """9 to 12 numbers."""
    return _sorted(rng, _uniform(rng, rng.randint(9, 12)))


def _uniform(rng: random.Random, n_numbers: int, *, low: int = 0, high: int = 999) -> list[int]:
    return [rng.randint(low, high) for _ in range(n_numbers)]


def _sorted(rng: random.Random, numbers: list[int]) -> Example:
    """The question that asks for `numbers` in order, worked out."""
    word = rng.choice(("ascending", "descending"))
    reverse = word == "descending"
    items = [(f"{number:03d}", letter) for number, letter in zip(numbers, ascii_lowercase, strict=False)]
    runs = [[item] for item in items]
    steps = ["list " + "".join(map(_text, runs))]
    while len(runs) > 1:
        runs = [_merged(runs[start : start + 2], reverse=reverse) for start in range(0, len(runs), 2)]
        steps.append("|".join(map(_text, runs)))
    answer = " ".join(map(str, sorted(numbers, reverse=reverse)))
    return Example(f"Sort in {word} order: {' '.join(map(str, numbers))}", tuple(steps), answer)


def _merged(runs: list[list[Item]], *, reverse: bool) -> list[Item]:
    """Neighbouring runs as one in order; of equal numbers the first run's come first."""
    return sorted((item for run in runs for item in run), key=lambda item: item[0], reverse=reverse)


def _text(run: list[Item]) -> str:
    """A run as the scratchpad shows it."""
    return "".join(digits + letter for digits, letter in run)
