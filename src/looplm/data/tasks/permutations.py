"""Permutation tracking in S3: read permutations of three objects, and say after each what their product so far is.

Order matters (S3 is not commutative), so the product at position n needs n steps in sequence, or a cleverer algorithm
than one layer can run. Token 0 is BOS: without it, position 0 attends to itself alone and looks like a repeated token.
"""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from looplm.data.pack import IGNORE

ELEMENTS = list(permutations(range(3)))
BOS_ID = 0
VOCAB_SIZE = 1 + len(ELEMENTS)  # BOS, then the permutations
N_ANSWERS = len(ELEMENTS)
# PRODUCT[a, b]: apply a, then b
PRODUCT = np.array([[ELEMENTS.index((b[a[0]], b[a[1]], b[a[2]])) for b in ELEMENTS] for a in ELEMENTS])


def sequences(
    rng: np.random.Generator, *, n_sequences: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (B, 1 + length) and answers (B, 1 + length), IGNORE under BOS. The answer stands at the position of the
    last permutation it depends on: nothing is shifted."""
    drawn = rng.integers(0, len(ELEMENTS), size=(n_sequences, length))
    ids = np.concatenate([np.full((n_sequences, 1), BOS_ID), drawn + 1], axis=1)
    answers = np.concatenate([np.full((n_sequences, 1), IGNORE), products(drawn)], axis=1)
    return ids.astype(np.int64), answers.astype(np.int64)


def products(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """The product of all permutations up to each position (B, T), for permutations 0..5 (B, T)."""
    so_far = drawn.copy()
    for position in range(1, drawn.shape[1]):
        so_far[:, position] = PRODUCT[so_far[:, position - 1], drawn[:, position]]
    return so_far
