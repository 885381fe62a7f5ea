"""Files are read, or refused with one line that names the file and what is wrong with it."""

import os
from pathlib import Path

import pytest
import yaml

from looplm.errors import CheckpointError, ConfigError
from looplm.reading import MOST_LEVELS, dump_yaml, parse_json, parse_yaml, read_json, read_text, read_yaml

BAD_ANYWHERE = {
    "empty": b"",
    "not UTF-8": b"a: \xff\xfe\n",
    "UTF-16": "{}".encode("utf-16"),
    "zero bytes": b"{\0}",
    "nested deep": b"[" * 20_000,
    "nested mappings": b'{"a":' * 5_000,
    "a number of 100,000 digits": b'{"a": ' + b"1" * 100_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a list": b"[1, 2]",
    "a text": b'"a"',
    "nothing": b"null",
    "cut short": b'{"a": [1, 2',
}
BAD_YAML = {
    "tabs": b"a:\n\t- 1\n",
    "an object": b"!!python/object/apply:os.system ['true']",
    "a date that is none, tagged": b"a: !!timestamp 2024-13-45",
    "an alias of itself": b"a: &a [*a]",
    "an unknown alias": b"a: *b",
    "aliases that multiply": b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)),
    "merged aliases that multiply": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)),
    "two documents": b"---\na: 1\n---\nb: 2\n",
    "a key that is a list": b"? [a]\n: 1\n",
}


@pytest.mark.parametrize("data", (BAD_ANYWHERE | BAD_YAML).values(), ids=(BAD_ANYWHERE | BAD_YAML).keys())
def test_bad_yaml_is_one_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        read_yaml(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", BAD_ANYWHERE.values(), ids=BAD_ANYWHERE.keys())
def test_bad_json_is_one_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.json") as caught:
        read_json(path, error=CheckpointError)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for path in (pipe, tmp_path, Path("/dev/zero"), link, tmp_path / "missing", Path("zero\0byte"), Path("a" * 300)):
        with pytest.raises(ConfigError, match=r"a folder|a device or a pipe|does not exist|cannot be read"):
            read_text(path)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 30)  # sparse
    with pytest.raises(ConfigError, match=r"large\.yaml.*more than"):
        read_yaml(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "marked"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == read_yaml(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("-.5", -0.5),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("nan", "nan"),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("{1: 2, yes: 3}", {"1": 2, "yes": 3}),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
    ],
)
def test_yaml_means_what_people_type(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_as_written_keeps_every_scalar_as_text() -> None:
    assert parse_yaml("{a: [007, yes, 1e-3], b: null}", as_written=True) == {"a": ["007", "yes", "1e-3"], "b": "null"}


def test_written_yaml_is_read_as_it_was_by_this_and_other_readers() -> None:
    texts = [
        "1e-3",
        "010",
        "0x1f",
        "1_0",
        "yes",
        "~",
        "",
        "2024-01-01",
        "12:30",
        "<<",
        "=",
        " a",
        "a #b",
        "é😀",
        "a\nb",
    ]
    data = {"texts": texts, "numbers": [1e-5, 3, -0.0], "others": [True, None, [], {}]}
    assert parse_yaml(dump_yaml(data)) == yaml.safe_load(dump_yaml(data)) == data


def test_json_is_nested_as_deep_as_the_limit_from_any_depth_of_the_stack() -> None:
    parse_json("[" * MOST_LEVELS + "1" + "]" * MOST_LEVELS)
    parse_json('"' + "[" * 5000 + '"')
    for n_levels in (MOST_LEVELS + 1, 1000, 100_000):
        with pytest.raises(ValueError, match="levels"):
            parse_json("[" * n_levels + "1" + "]" * n_levels)


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_not() -> None:
    assert parse_json(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}
    for line in (r'{"a": "\ud800"}', r'{"\uDC00": 1}', r'[["x\udfffy"]]', b'"\xed\xa0\x80"', b'"\xff"', '"\ud800"'):
        with pytest.raises(UnicodeError):
            parse_json(line)
