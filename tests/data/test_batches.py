"""Packing, sources and loader."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.data.loader import Loader
from looplm.data.pack import IGNORE, Batch, Document, pack
from looplm.data.sources import (
    PermutationsConfig,
    PermutationsSource,
    ReasoningConfig,
    ReasoningSource,
    make_source,
)
from looplm.data.tasks.example import is_test_question
from looplm.data.tokenizer import PAD_ID, SPECIAL, VOCAB_SIZE, reasoning_tokenizer, train_tokenizer


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), n_rows=st.integers(1, 4), row_len=st.integers(8, 40))
def test_packing_keeps_documents_whole_and_shifts_once(seed: int, n_rows: int, row_len: int) -> None:
    rng = random.Random(seed)
    drawn: list[Document] = []

    def draw() -> Document:
        length = rng.randint(2, row_len + 3)
        first = 1 + sum(len(document.ids) for document in drawn)
        drawn.append(Document(list(range(first, first + length)), rng.randint(1, length - 1)))
        return drawn[-1]

    batch = pack(draw, n_rows=n_rows, row_len=row_len, pad_id=0)
    by_first = {document.ids[0]: document for document in drawn}
    for ids, targets, documents in zip(batch.ids, batch.targets, batch.documents, strict=True):  # type: ignore[arg-type]
        for number in set(documents.tolist()) - {0}:
            places = (documents == number).nonzero().flatten().tolist()
            document = by_first[int(ids[places[0]])]
            assert ids[places].tolist() == document.ids
            scored = [t for t in targets[places].tolist() if t != IGNORE]
            assert scored == document.ids[document.n_prompt :]
            for place in places:
                if targets[place] != IGNORE:
                    assert targets[place] == ids[place + 1]
        padding = documents == 0
        assert bool((targets[padding] == IGNORE).all())


def test_packing_the_suite_wastes_little_and_drops_next_to_nothing() -> None:
    """What is dropped is missing from the mixture, and it would always be the short tasks."""
    config = ReasoningConfig()
    source = ReasoningSource(config, seed=0)
    lengths: list[int] = []

    def draw() -> Document:
        document = source.draw(rng)
        lengths.append(len(document.ids))
        return document

    n_kept, n_padding = 0, 0
    for index in range(8):
        rng = random.Random(index)
        batch = pack(draw, n_rows=config.n_rows, row_len=config.row_len, pad_id=PAD_ID)
        assert batch.documents is not None
        n_kept += int(batch.documents.max())
        n_padding += int((batch.documents == 0).sum())
    assert n_kept > 0.97 * len(lengths)
    assert n_padding < 0.08 * 8 * config.n_rows * config.row_len


def test_no_document_of_the_suite_is_longer_than_a_row() -> None:
    """A longer one would silently never be trained on."""
    from looplm.data.tasks import REASONING
    from looplm.data.tasks.example import render_completion, render_prompt

    tokenizer, rng = reasoning_tokenizer(), random.Random(5)
    for task in REASONING.values():
        for _ in range(1500):
            example = task.sample(rng)
            text = render_prompt(example.question) + render_completion(example)
            assert len(tokenizer.encode(text).ids) <= ReasoningConfig().row_len, text


def test_no_test_question_is_ever_in_training() -> None:
    source = ReasoningSource(ReasoningConfig(n_rows=8), seed=1)
    n_seen = 0
    for index in range(12):
        batch = source.batch(index)
        for ids, documents in zip(batch.ids, batch.documents, strict=True):  # type: ignore[arg-type]
            for number in set(documents.tolist()) - {0}:
                text = source.tokenizer.decode(ids[documents == number].tolist(), skip_special_tokens=False)
                question = text.partition("</INST>")[0].removeprefix("<INST>")
                assert not is_test_question(question)
                n_seen += 1
    assert n_seen > 150


def test_batches_are_a_function_of_seed_and_number() -> None:
    for config in (ReasoningConfig(n_rows=2), PermutationsConfig(batch_size=4)):
        one, two = make_source(config, seed=1), make_source(config, seed=1)
        two.batch(0)
        assert torch.equal(one.batch(5).ids, two.batch(5).ids)
        assert not torch.equal(one.batch(5).ids, one.batch(6).ids)
        other = make_source(config, seed=2).batch(5).ids
        assert one.batch(5).ids.shape != other.shape or not torch.equal(one.batch(5).ids, other)


def test_permutation_lengths_ramp_up() -> None:
    source = PermutationsSource(PermutationsConfig(batch_size=2, min_len=2, max_len=12, n_ramp=100), seed=0)
    lengths = [source.batch(index).ids.shape[1] - 1 for index in range(300)]
    assert max(lengths[:10]) <= 4
    assert set(lengths[100:]) == set(range(2, 13))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_loader_gives_batches_in_order_from_where_it_is_told(n_workers: int) -> None:
    source = PermutationsSource(PermutationsConfig(batch_size=2), seed=0)
    loader = Loader(source, start=4, n_workers=n_workers)
    batches = iter(loader)
    got: list[Batch] = [next(batches) for _ in range(3)]
    for index, batch in enumerate(got, start=4):
        assert torch.equal(batch.ids, source.batch(index).ids)
    assert loader.seconds_waited > 0


def test_the_saved_tokenizer_is_what_training_it_gives() -> None:
    assert train_tokenizer().to_str() == reasoning_tokenizer().to_str()


def test_tags_are_single_tokens_and_digits_and_marks_stand_alone() -> None:
    tokenizer = reasoning_tokenizer()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert tokenizer.token_to_id(SPECIAL[0]) == PAD_ID
    assert tokenizer.encode("472==larger").tokens == ["4", "7", "2", "=", "=", "larger"]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = reasoning_tokenizer()
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
