"""Records: what is read of each form, and that nothing is left out uncounted."""

from typing import Any

import pytest

from looplm.data.records import Skipped, check_field, record_text
from looplm.errors import ConfigError

TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
ANSWER = {"role": "assistant", "content": "yo"}


def turn(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [turn([TEXT]), ANSWER]}, "user: hi\nassistant: yo"),
        ({"messages": [turn(["hi", {"text": "there"}]), ANSWER]}, "user: hi\nthere\nassistant: yo"),
        ({"messages": [turn(TEXT), ANSWER]}, "user: hi\nassistant: yo"),
        ({"messages": [turn(""), ANSWER]}, "user: \nassistant: yo"),
        ({"conversations": [{"from": "human", "value": [TEXT]}]}, "human: hi"),
        ({"conversations": [{"from": "human", "content": None, "value": "q"}]}, "human: q"),
        ({"content": [TEXT]}, "hi"),
        ({"question": [TEXT], "answer": "yo"}, "hi\nyo"),
    ],
)
def test_text_parts_of_a_message_are_read(record: Any, text: str) -> None:
    skipped = Skipped()
    assert record_text(record, skipped=skipped) == text
    assert not skipped


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [turn(None), ANSWER]}, "with a turn without text"),
        ({"messages": [turn([]), ANSWER]}, "with a turn without text"),
        ({"messages": [turn(7), ANSWER]}, "with a turn without text"),
        ({"messages": [{"role": "user"}, ANSWER]}, "with a turn without text"),
        ({"messages": [{"content": "hi"}, ANSWER]}, "with a turn without role"),
        ({"messages": ["hi"]}, "without messages as text"),
        ({"conversations": "hi"}, "without conversations as text"),
        ({"messages": []}, "without text"),
        ({"text": 7}, "without text as text"),
        ({"question": "2+2?", "answer": 4}, "without answer as text"),
        ({"question": "2+2?"}, "without text"),
        (None, "without text"),
    ],
)
def test_a_record_that_cannot_be_read_whole_is_counted_by_its_reason(record: Any, reason: str) -> None:
    skipped = Skipped()
    assert record_text(record, skipped=skipped) is None
    assert skipped == {reason: 1}
    assert skipped.lines() == [f"left out: 1 documents, {reason}"]


def test_parts_that_are_no_text_are_counted_and_the_others_read() -> None:
    skipped = Skipped()
    assert record_text({"messages": [turn([IMAGE, TEXT, 7]), ANSWER]}, skipped=skipped) == "user: hi\nassistant: yo"
    assert skipped == {"parts of type 'image_url'": 1, "parts of type 'int'": 1}
    assert "left out: 1 parts of type 'image_url'" in skipped.lines()
    assert record_text({"messages": [turn([IMAGE]), ANSWER]}, skipped=skipped) is None
    assert skipped["with a turn without text"] == 1


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("a", "one", None),
        ("a,b", "one\ntwo", None),
        ("b, a", "two\none", None),
        ("a,empty", "one", None),
        ("chat", "user: hi\nassistant: yo", None),
        ("parts", "hi", None),
        ("a,c", None, "without c"),
        ("number", None, "without number as text"),
    ],
)
def test_named_fields_are_read_in_their_order(field: str, text: str | None, reason: str | None) -> None:
    record = {"a": "one", "b": "two", "empty": "", "chat": [turn("hi"), ANSWER], "parts": [TEXT], "number": 7}
    skipped = Skipped()
    assert record_text(record, field=field, skipped=skipped) == text
    assert skipped == ({} if reason is None else {reason: 1})


@pytest.mark.parametrize("field", ["", "a,", "a,,b"])
def test_a_field_without_a_name_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="has an empty name"):
        check_field(field)
