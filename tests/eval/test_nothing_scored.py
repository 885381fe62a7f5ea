"""Batches in which nothing is scored change no mean, and there is no mean of nothing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from looplm.data.pack import IGNORE, Batch
from looplm.errors import DataError
from looplm.eval.loops import bits_per_byte, follow_states, held_out_loss, next_token_score
from looplm.model.looped import LoopedLM

BYTES = np.ones(40, dtype=np.int64)


def batches() -> tuple[Batch, Batch]:
    """A batch, and one like it of which nothing is scored."""
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    scored = Batch(ids[:, :-1], ids[:, 1:])
    return scored, replace(scored, targets=torch.full_like(scored.targets, IGNORE))


def test_a_batch_with_nothing_scored_changes_no_mean(make_model: Callable[..., LoopedLM]) -> None:
    model, (scored, empty) = make_model(), batches()
    for measure in (
        lambda given: held_out_loss(model, given, n_loops=2),
        lambda given: bits_per_byte(model, given, BYTES, n_loops=2),
        lambda given: next_token_score(model, given, n_loops=2),
        lambda given: follow_states(model, given, n_loops=3),
    ):
        assert measure([empty, scored, empty]) == measure([scored])


def test_tags_alone_have_no_bits_per_byte(make_model: Callable[..., LoopedLM]) -> None:
    scored, _ = batches()
    with pytest.raises(DataError, match="no token of the held-out data is scored"):
        bits_per_byte(make_model(), [scored], np.zeros(40, dtype=np.int64), n_loops=2)


def test_nothing_scored_at_all_is_one_error(make_model: Callable[..., LoopedLM]) -> None:
    model, (_, empty) = make_model(), batches()
    for measure in (held_out_loss, next_token_score, follow_states):
        for given in ([empty], []):
            with pytest.raises(DataError, match="no token of the held-out data is scored"):
                measure(model, given, n_loops=2)
