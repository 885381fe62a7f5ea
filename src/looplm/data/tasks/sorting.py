"""`Sort in ascending order: {list}` and descending.

The scratchpad gives every number a letter and sorts by one digit at a time from the left: each line keeps the columns
sorted before it and orders the next column within their groups. Sorted digits come first, then the letter, which
settles which number is meant where several begin alike, then the digits copied after it: `list 995a 961b`,
`hundreds 9a95 9b61`, `tens 96b1 99a5`, `units 961b 995a`. Every line has the same length, so its columns stand right
under the one before.
"""

import random
from string import ascii_lowercase

from looplm.data.tasks.example import Example

NAME = "sorting"


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """3 to 8 numbers in 0..999; small ones in 0..99."""
    return _sample(rng, rng.randint(3, 8), top=99 if small else 999)


def sample_harder(rng: random.Random) -> Example:
    """9 to 12 numbers."""
    return _sample(rng, rng.randint(9, 12), top=999)


def _sample(rng: random.Random, n_numbers: int, *, top: int) -> Example:
    numbers = [rng.randint(0, top) for _ in range(n_numbers)]
    word = rng.choice(("ascending", "descending"))
    reverse = word == "descending"
    items = [(f"{number:03d}", letter) for number, letter in zip(numbers, ascii_lowercase, strict=False)]
    steps = [_line("list", items, n_sorted=3)]
    for n_sorted, name in enumerate(("hundreds", "tens", "units"), start=1):
        items = _sorted_by(items, n_sorted, reverse=reverse)
        steps.append(_line(name, items, n_sorted=n_sorted))
    answer = " ".join(map(str, sorted(numbers, reverse=reverse)))
    return Example(f"Sort in {word} order: {' '.join(map(str, numbers))}", tuple(steps), answer)


def _sorted_by(items: list[tuple[str, str]], n_digits: int, *, reverse: bool) -> list[tuple[str, str]]:
    """Items in order of their first digits, equal ones left as they were."""
    return sorted(items, key=lambda item: item[0][:n_digits], reverse=reverse)


def _line(name: str, items: list[tuple[str, str]], *, n_sorted: int) -> str:
    """One line of the scratchpad: the letter stands behind the sorted digits."""
    return " ".join([name, *(digits[:n_sorted] + letter + digits[n_sorted:] for digits, letter in items)])
