"""Short stories with one or two operations, numbers 1..99, never a negative result on the way."""

import random

from looplm.data.tasks.example import Example
from looplm.data.tasks.scratchpad import compute

NAME = "word_problem"

NAMES = (
    "Tom Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olivia Paul Quinn Rosa Sam Tina Uma"
    " Victor Wendy Yara Zoe"
).split()
OBJECTS = (
    "apples books pencils marbles stickers coins cookies cards shells stamps balloons oranges pens toys eggs flowers"
    " candies buttons stones beads cups pears plums keys"
).split()

# {a} {b} {c} numbers, {n} and {m} two names, {o} the objects; the operations run from left to right on a, b, c.
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("+", "{n} has {a} {o}. {s} buys {b} more. How many {o} does {n} have?"),
    ("+", "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?"),
    ("+", "{n} has {a} {o} and {m} has {b} {o}. How many {o} do they have together?"),
    ("+", "{n} found {a} {o} on Monday and {b} {o} on Tuesday. How many {o} did {n} find in total?"),
    ("+", "There are {a} {o} on the table. {n} puts {b} more {o} there. How many {o} are on the table?"),
    ("+", "{n} has {a} {o}. {m} has {b} more {o} than {n}. How many {o} does {m} have?"),
    ("-", "{n} has {a} {o}. {s} gives {b} to {m}. How many {o} does {n} have left?"),
    ("-", "{n} has {a} {o}. {s} loses {b} of them. How many {o} are left?"),
    ("-", "There are {a} {o} in a box. {n} takes {b} out. How many {o} are still in the box?"),
    ("-", "{n} had {a} {o} and sold {b} of them. How many {o} does {n} have now?"),
    ("-", "{n} has {a} {o}. {m} has {b} fewer {o} than {n}. How many {o} does {m} have?"),
    ("-", "{n} needs {a} {o} and has {b}. How many more {o} does {n} need?"),
    ("*", "{n} has {a} boxes with {b} {o} each. How many {o} does {n} have?"),
    ("*", "Each of {a} children gets {b} {o}. How many {o} is that in total?"),
    ("*", "{n} buys {a} bags. Each bag holds {b} {o}. How many {o} does {n} buy?"),
    ("*", "{n} puts {a} {o} in each of {b} rows. How many {o} are there?"),
    ("*", "{n} collects {a} {o} every day for {b} days. How many {o} does {n} collect?"),
    ("++", "{n} has {a} {o}. {s} buys {b} more and finds {c} more. How many {o} does {n} have?"),
    ("++", "{n} has {a} {o}, {m} has {b} and a friend has {c}. How many {o} do they have in all?"),
    ("+-", "{n} has {a} {o}. {s} buys {b} more and gives {c} to {m}. How many {o} does {n} have?"),
    ("+-", "There are {a} {o} in a basket. {n} adds {b} and {m} takes {c}. How many {o} are in the basket?"),
    ("-+", "{n} has {a} {o}. {s} loses {b} and then finds {c}. How many {o} does {n} have?"),
    ("-+", "{n} had {a} {o}, sold {b} and bought {c}. How many {o} does {n} have now?"),
    ("--", "{n} has {a} {o}. {s} gives {b} to {m} and loses {c}. How many {o} are left?"),
    ("--", "There are {a} {o} in a jar. {n} takes {b} and {m} takes {c}. How many {o} are left in the jar?"),
    ("*+", "{n} has {a} boxes with {b} {o} each and {c} more {o}. How many {o} does {n} have?"),
    ("*+", "{n} buys {a} bags of {b} {o}. {m} gives {n} {c} more. How many {o} does {n} have?"),
    ("*-", "{n} has {a} boxes with {b} {o} each. {s} gives away {c} {o}. How many {o} are left?"),
    ("*-", "A shop has {a} shelves with {b} {o} each and sells {c} {o}. How many {o} are left?"),
    ("+*", "Each day {n} makes {a} {o} and {m} makes {b} {o}. How many {o} do they make in {c} days?"),
)


def sample(rng: random.Random, *, small: bool = False) -> Example:
    """One of the templates, uniformly; small: one digit as often as two."""
    return _sample(rng, low=1, high=99, small=small)


def sample_harder(rng: random.Random) -> Example:
    """The same stories with numbers of 100..999."""
    return _sample(rng, low=100, high=999)


def _sample(rng: random.Random, *, low: int, high: int, small: bool = False) -> Example:
    ops, template = rng.choice(TEMPLATES)
    while True:
        numbers = [rng.randint(low, 9 if small and rng.random() < 0.5 else high) for _ in range(len(ops) + 1)]
        value = numbers[0]
        steps: tuple[str, ...] = ()
        for op, number in zip(ops, numbers[1:], strict=True):
            work = compute(value, op, number)
            value, steps = work.value, steps + work.steps
            if value < 0:
                break
        if value >= 0:
            break
    name, other = rng.sample(NAMES, 2)
    names = {"n": name, "m": other, "s": rng.choice(("He", "She")), "o": rng.choice(OBJECTS)}
    return Example(template.format(**names, **dict(zip("abc", numbers, strict=False))), steps, str(value))
