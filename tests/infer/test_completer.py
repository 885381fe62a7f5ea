"""Text to ids and back, where a model has more ids than there are bytes or tokens."""

from pathlib import Path

import pytest

from looplm.data import bpe
from looplm.data.bpe import save_tokenizer, train_bpe
from looplm.infer.completer import Subwords, Utf8


def test_ids_without_a_byte_are_shown_as_such() -> None:
    assert Utf8().decode([72, 256, 105, 100_000, 255]) == "H\ufffdi\ufffd\ufffd"
    assert Utf8().decode("é 😀".encode()) == "é 😀"


@pytest.fixture
def codec(tmp_path: Path) -> Subwords:
    tokenizer = train_bpe(["hello, world é"] * 9, vocab_size=280)
    tokenizer.enable_truncation(max_length=3)
    save_tokenizer(tokenizer, tmp_path)
    return Subwords(tmp_path)


def test_ids_without_a_token_are_shown_as_such(codec: Subwords) -> None:
    ids = codec.encode("hello é")
    assert codec.decode(ids) == "hello é"
    assert codec.decode([*ids, 280, 99_999, *ids]) == "hello é\ufffd\ufffdhello é"
    assert codec.decode([]) == ""


def test_a_long_prompt_is_encoded_in_pieces_and_not_cut_short(codec: Subwords, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "hello, world " * 30
    ids = codec.encode(prompt)
    assert codec.decode(ids) == prompt
    monkeypatch.setattr(bpe, "MOST_ENCODED", 50)
    assert codec.encode(prompt) == ids
