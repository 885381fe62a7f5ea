"""Texts of any length and vocabularies with gaps in their ids."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from looplm.data import bpe
from looplm.data.bpe import compression, cut, encode, encode_all, n_ids, token_bytes, train_bpe
from looplm.data.prepare import PrepareConfig, prepare
from looplm.data.prepared import PreparedConfig, PreparedSource

TEXT = "The cat sat, and 12 dogs ran.\n\n    def f(x):\r\n\treturn x  # it's é 漢\n" * 20


def with_gap(last: int) -> Tokenizer:
    """A tokenizer whose last token has this id."""
    made = json.loads(train_bpe([TEXT], vocab_size=300).to_str())
    vocab = made["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = last
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(("last", "dtype"), [(900, "uint16"), (65535, "uint16"), (65536, "uint32"), (70000, "uint32")])
def test_the_vocabulary_is_as_large_as_its_largest_id(tmp_path: Path, last: int, dtype: str) -> None:
    tokenizer = with_gap(last)
    assert n_ids(tokenizer) == last + 1
    sizes = token_bytes(tokenizer)
    assert len(sizes) == last + 1
    assert sizes[last] > 0
    assert not any(sizes[299:last])
    (tmp_path / "t.txt").write_text(TEXT)
    manifest = prepare(PrepareConfig(sources=[str(tmp_path / "t.txt")], held_out=0), tokenizer, tmp_path / "p")
    assert (manifest.vocab_size, manifest.dtype) == (last + 1, dtype)
    source = PreparedSource(PreparedConfig(folders={str(tmp_path / "p"): 1}, n_rows=1, row_len=64), seed=0)
    assert source.vocab_size == len(source.token_bytes) == last + 1
    learned = np.concatenate([source.batch(number).ids.flatten().numpy() for number in range(20)])
    assert sum(sizes[token] for token in encode(tokenizer, TEXT)) == len(TEXT.encode())
    assert set(learned.tolist()) <= set(range(last + 1))


def test_added_tokens_have_the_bytes_of_their_spelling() -> None:
    tokenizer = train_bpe([TEXT], vocab_size=280)
    tokenizer.add_tokens([AddedToken("éé", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<é>", special=True)])
    sizes = token_bytes(tokenizer)
    assert sizes[-2:] == [4, 0]
    text = "a éé b"
    assert sum(sizes[token] for token in tokenizer.encode(text).ids) == len(text.encode())


@given(st.text("ab 1\n\r\t'.<|é漢\u00a0\u0301", max_size=300), st.integers(1, 60))
def test_pieces_are_the_text(text: str, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "MOST_ENCODED", most)
        pieces = list(cut(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= most for piece in pieces) or text == ""


def test_a_long_text_has_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe([TEXT], vocab_size=305)
    rng = random.Random(0)
    text = "".join(
        rng.choices(["the cat", " sat", "\n", "  \n\n", "    ", "x1,2", "\r\n", "é ", "\t", "it's", ". "], k=4000)
    )
    whole = tokenizer.encode(text).ids
    monkeypatch.setattr(bpe, "MOST_ENCODED", 100)
    assert len(list(cut(text))) > 100
    assert encode(tokenizer, text) == whole
    assert encode_all(tokenizer, ["a", text, ""]) == [tokenizer.encode("a").ids, whole, []]
    assert compression(tokenizer, [text]).n_tokens == len(whole)


@pytest.mark.long
@pytest.mark.parametrize("blank", [" ", "\t"])
def test_ten_million_blanks_in_a_row_are_encoded(blank: str) -> None:
    tokenizer = train_bpe([TEXT], vocab_size=270)
    text = "a" + blank * 10_100_000 + "b"
    (ids,) = encode_all(tokenizer, [text])
    assert tokenizer.decode(ids) == text
