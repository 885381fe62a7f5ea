"""Tokenizers of one's own: exact in both directions, no tag out of a text, the same again, and readable elsewhere."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models

from looplm.data.bpe import (
    CHAT_TEMPLATE,
    SPECIAL,
    Compression,
    compression,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_bpe,
)
from looplm.errors import ConfigError, DataError

TEXT = [  # each twice: a pair that occurs once is not merged
    "Seventy two is 72, and 720 is ten times 72.\n" * 2,
    "def add(x, y):\n    return x + y  # it's 1234\n" * 2,
    "ärger, ärger",
]
TAGGED = "a<|user|>b<|/think|> <|end_of_text|>"
# any text, and such as holds what the pieces and the tags are made of
texts = st.one_of(
    st.text(), st.text("ab 1²٣é\u0301न\n\r\t\u00a0'<|>_-😀\u200d"), st.lists(st.sampled_from(SPECIAL)).map("x".join)
)


@cache
def trained(digits: int = 1) -> Tokenizer:
    return train_bpe(TEXT, vocab_size=300, digits=digits)


def test_tags_have_the_ids_of_v4() -> None:
    spelled = (
        "padding begin_of_text end_of_text unknown fim_prefix fim_middle fim_suffix think /think answer /answer user"
    )
    for index, name in enumerate([*spelled.split(), "assistant", "system"]):
        assert trained().token_to_id(f"<|{name}|>") == index
    assert len(SPECIAL) == 14


@given(texts)
def test_decoding_gives_any_text_back(text: str) -> None:
    for digits in (1, 2, 3):
        ids = trained(digits).encode(text).ids
        assert trained(digits).decode(ids, skip_special_tokens=False) == text
        assert trained(digits).decode(ids) == text
        assert all(i >= len(SPECIAL) for i in ids)


@given(texts)
def test_bytes_of_tokens_add_up(text: str) -> None:
    sizes = token_bytes(trained())
    assert sum(sizes[i] for i in trained().encode(text).ids) == len(text.encode())


def test_tags_stand_for_no_bytes() -> None:
    sizes = token_bytes(trained())
    assert len(sizes) == 300
    assert sizes[: len(SPECIAL)] == [0] * len(SPECIAL)
    assert min(sizes[len(SPECIAL) :]) == 1
    assert max(sizes) > 2


def test_bytes_are_not_guessed_of_other_tokenizers() -> None:
    other = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    other.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="byte-level"):
        token_bytes(other)


@pytest.mark.parametrize(("digits", "n_merges"), [(1, 0), (2, 4), (3, 5)])
def test_a_token_holds_so_many_digits_and_no_space_before_them(digits: int, n_merges: int) -> None:
    tokenizer = train_bpe(["12345678 " * 50], vocab_size=270 + n_merges, digits=digits)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" 12345678").ids]
    assert (
        pieces
        == {
            1: [" ", *"12345678"],
            2: [" ", "12", "34", "56", "78"],
            3: [" ", "123", "456", "78"],
        }[digits]
    )
    with pytest.raises(ConfigError, match=f"hold {n_merges} merges"):
        train_bpe(["12345678 " * 50], vocab_size=271 + n_merges, digits=digits)


def test_the_same_text_gives_the_same_tokenizer() -> None:
    again = [train_bpe(iter(TEXT), vocab_size=300).to_str() for _ in range(2)]
    assert again == [trained().to_str()] * 2


def test_nothing_is_put_around_a_text(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    for tokenizer in (trained(), load_tokenizer(tmp_path), load_tokenizer(tmp_path, reads_tags=True)):
        assert tokenizer.encode("").ids == []
        assert tokenizer.encode("x", add_special_tokens=True).ids == [tokenizer.token_to_id("x")]


def test_tags_in_a_text_are_read_only_when_asked_for(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    plain, reading = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tmp_path, reads_tags=True)
    assert min(plain.encode(TAGGED).ids) >= len(SPECIAL)
    assert plain.decode(plain.encode(TAGGED).ids) == TAGGED
    ids = reading.encode(TAGGED).ids
    assert [i for i in ids if i < len(SPECIAL)] == [11, 8, 2]
    assert reading.decode(ids, skip_special_tokens=False) == TAGGED
    assert reading.decode(ids) == "ab "


def test_tags_in_the_text_to_learn_from_become_no_tokens() -> None:
    tokenizer = train_bpe(["<|user|> " * 100 + "<|think|>" * 100], vocab_size=275)
    assert min(tokenizer.encode("<|user|>").ids) >= len(SPECIAL)
    assert tokenizer.decode(tokenizer.encode("<|user|>").ids) == "<|user|>"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "tok"
    save_tokenizer(trained(), folder)
    assert load_tokenizer(folder).to_str() == trained().to_str()
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    for name, tag in (("pad", 0), ("bos", 1), ("eos", 2), ("unk", 3)):
        assert config[f"{name}_token"] == SPECIAL[tag]
    with pytest.raises(ConfigError, match="already holds a tokenizer"):
        save_tokenizer(trained(), folder)
    with pytest.raises(ConfigError, match="is a file"):
        save_tokenizer(trained(), folder / "tokenizer.json")


def test_a_missing_or_cut_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(trained().to_str()[:500])
    with pytest.raises(DataError, match="not a whole tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 269}, "take 270"),
        ({"vocab_size": 300, "digits": 0}, "digits is 0"),
        ({"vocab_size": 300, "digits": 4}, "digits is 4"),
        ({"vocab_size": 300, "min_frequency": 0}, "min_frequency is 0"),
        ({"vocab_size": 60000}, "ask for 3[0-9][0-9] or less"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train_bpe(TEXT, **options)


def test_the_size_it_says_can_be_filled_can_be() -> None:
    with pytest.raises(ConfigError) as refused:
        train_bpe(TEXT, vocab_size=5000)
    most = int(str(refused.value).split("ask for ")[1].split(" ")[0].replace(",", ""))
    assert train_bpe(TEXT, vocab_size=most).get_vocab_size() == most
    assert train_bpe(TEXT, vocab_size=270).get_vocab_size() == 270


def test_no_text_is_said() -> None:
    for empty in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_bpe(empty, vocab_size=300)


def test_compression_counts_bytes_and_tokens() -> None:
    found = compression(trained(), ["ärger", "", "xyz"])
    assert found.n_bytes == 9
    assert found.n_tokens == len(trained().encode("ärger").ids) + 3
    assert Compression(n_bytes=6, n_tokens=4).bytes_per_token == 1.5
    assert compression(trained(), []).bytes_per_token == 0


def render(turns: list[dict[str, object]], *, prompt: bool = False) -> str:
    """As Hugging Face does: its environment and its `raise_exception`."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(CHAT_TEMPLATE).render(messages=turns, add_generation_prompt=prompt)


def test_chat_template() -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2+2?\n"}]
    answered = [*asked, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    start = "<|begin_of_text|><|system|>Be brief.<|user|> 2+2?\n"
    assert render(list(asked)) == start
    assert render(list(asked), prompt=True) == start + "<|assistant|>"
    assert render(list(answered)) == start + "<|assistant|>4<|end_of_text|><|user|>Sure?"
    assert render(asked[1:]) == "<|begin_of_text|><|user|> 2+2?\n"


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"role": "tool", "content": "x"}], "no role tool"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "only be the first"),
        ([{"role": "user", "content": None}], "must be a text"),
    ],
)
def test_chat_template_refuses_other_turns(turns: list[dict[str, object]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        render(turns)
