"""Files of questions and prompts as people write them."""

import json
import os
from pathlib import Path

import pytest

from looplm.errors import DataError
from looplm.eval.lines import numbered_lines
from looplm.eval.reasoning import Question, read_questions

RECORD = {"task": "mine", "question": "What is 1 + 1?", "answer": "2"}
GOOD = json.dumps(RECORD).encode()


def test_byte_order_marks_line_ends_and_blank_lines_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes("\ufeffone\r\n\r\n  \n two\u2028three\n".encode())
    assert numbered_lines(path) == [(1, "one"), (4, " two\u2028three")]
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n")
    assert read_questions(path) == [Question("mine", "What is 1 + 1?", "2")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"task": "t", "question": "caf\xe9", "answer": "1"}', "byte 31 (0xe9) is not UTF-8"),
        (b"not JSON", "Expecting value"),
        (b"[1, 2]", "not an object"),
        (b"null", "not an object"),
        (b'{"task": "t", "question": "x"}', "answer is missing"),
        (b'{"task": "t", "question": "x", "answer": null}', "answer is NoneType, not text"),
        (b'{"task": "t", "question": ["x"], "answer": "1"}', "question is list, not text"),
        (b'{"task": "t", "question": "x", "answer": true}', "answer is bool, not text"),
        (b'{"task": "t", "question": "  ", "answer": "1"}', "question is empty"),
        (b'{"task": "cot_format", "question": "x", "answer": "1"}', "cannot be one"),
        (b'{"task": "t", "question": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        (b'{"task": "t", "question": "x", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels"),
        (b'{"task": "t", "question": "x", "answer": ' + b"9" * 100_000 + b"}", "digits"),
    ],
)
def test_a_line_that_is_no_question_is_one_error_with_its_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=r"q\.jsonl.*line 3: ") as refused:
        read_questions(path)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_an_answer_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**RECORD, "answer": 2}))
    assert read_questions(path)[0].answer == "2"


def test_what_is_no_file_of_lines_is_refused(tmp_path: Path) -> None:
    pipe, empty, wide, large = (tmp_path / name for name in ("pipe", "empty", "wide", "large"))
    os.mkfifo(pipe)
    empty.write_bytes(b"\xef\xbb\xbf\n")
    wide.write_bytes("\ufeffone".encode("utf-16-le"))
    with large.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for path, says in (
        (tmp_path, "is a folder"),
        (pipe, "is a device or a pipe"),
        (Path("/dev/zero"), "is a device or a pipe"),
        (empty, "holds no questions"),
        (wide, "is UTF-16; save it as UTF-8"),
        (large, "bytes"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(DataError, match=says):
            read_questions(path)
