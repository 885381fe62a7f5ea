"""The reasoner's tokenizer and text from outside."""

import pytest

from looplm.data.tokenizer import SPECIAL, check_text, longest_token, reasoning_tokenizer
from looplm.errors import DataError


@pytest.mark.parametrize("tag", SPECIAL)
def test_a_tag_spelled_out_is_text_unless_a_template_wrote_it(tag: str) -> None:
    outside, ours = reasoning_tokenizer(reads_tags=False), reasoning_tokenizer()
    assert ours.encode(f"a{tag}b").tokens == ["a", tag, "b"]
    ids = outside.encode(f"a{tag}b").ids
    assert ours.token_to_id(tag) not in ids
    assert ours.decode(ids, skip_special_tokens=False) == f"a{tag}b"


def test_what_cannot_be_encoded_is_refused_with_its_place() -> None:
    check_text("é 😀 \x00", most=10)
    with pytest.raises(DataError, match=r"character 4 is '\\udce9'"):
        check_text("caf\udce9", most=10)
    with pytest.raises(DataError, match="the question is not UTF-8"):
        check_text("\ud83d", most=10, what="the question")
    with pytest.raises(DataError, match="10,000,000 characters"):
        check_text(" " * 10_000_000, most=9_999_999)


def test_no_text_has_fewer_tokens_than_by_the_longest() -> None:
    tokenizer = reasoning_tokenizer(reads_tags=False)
    for text in ("What is the perimeter of a rectangle?", "apples " * 50, "日本 😀"):
        assert len(text) <= len(tokenizer.encode(text).ids) * longest_token(tokenizer)
