"""`Sort in ascending order: {list}` and descending.

The scratchpad gives every number a letter and sorts by one digit at a time from the left: each line keeps the columns
sorted before it and orders the next column within their groups, as `list 995a961b`, `hundreds 995a961b`,
`tens 961b995a`, `units 961b995a`. The letter stands behind its number: digits stay together for copying, what was
copied last is known by one token where several numbers begin alike, and no space is needed. Every line has
the same length, so its columns stand right under the one before.
"""

import random
from string import ascii_lowercase

from looplm.data.tasks.example import Example

NAME = "sorting"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """3 to 8 numbers in 0..999; a small one is either 8 of them or from a narrow window, where many begin alike."""
    if not small:
        return _sample(rng, rng.randint(3, 8), low=0, high=999)
    if rng.random() < 0.5:
        return _sample(rng, 8, low=0, high=999)
    window = rng.choice((20, 60))
    low = rng.randint(0, 999 - window)
    return _sample(rng, rng.randint(3, 8), low=low, high=low + window)


def sample_harder(rng: random.Random) -> Example:
    """9 to 12 numbers."""
    return _sample(rng, rng.randint(9, 12), low=0, high=999)


def _sample(rng: random.Random, n_numbers: int, *, low: int, high: int) -> Example:
    numbers = [rng.randint(low, high) for _ in range(n_numbers)]
    word = rng.choice(("ascending", "descending"))
    reverse = word == "descending"
    items = [(f"{number:03d}", letter) for number, letter in zip(numbers, ascii_lowercase, strict=False)]
    steps = [_line("list", items)]
    for n_sorted, name in enumerate(("hundreds", "tens", "units"), start=1):
        items = _sorted_by(items, n_sorted, reverse=reverse)
        steps.append(_line(name, items))
    answer = " ".join(map(str, sorted(numbers, reverse=reverse)))
    return Example(f"Sort in {word} order: {' '.join(map(str, numbers))}", tuple(steps), answer)


def _sorted_by(items: list[tuple[str, str]], n_digits: int, *, reverse: bool) -> list[tuple[str, str]]:
    """Items in order of their first digits, equal ones left as they were."""
    return sorted(items, key=lambda item: item[0][:n_digits], reverse=reverse)


def _line(name: str, items: list[tuple[str, str]]) -> str:
    """One line of the scratchpad."""
    return f"{name} " + "".join(digits + letter for digits, letter in items)
