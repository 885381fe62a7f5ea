"""Files of every kind of text: read right, in pieces, or left out and counted."""

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from looplm.data import text_files
from looplm.data.documents import Skipped, parts_of, read_documents
from looplm.data.text_files import file_size
from looplm.errors import DataError

TEXT = "A line, é 漢.\r\n  Another.\n"
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".GZ": gzip.compress,
}


def read(path: Path, data: bytes) -> tuple[list[str], Skipped]:
    path.write_bytes(data)
    skipped = Skipped()
    return list(read_documents(str(path), skipped=skipped)), skipped


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["GPL-3", "README", "a.rst", "a.html", "a.c", "a.csv", "a.tsv", "a.TXT"])
def test_any_file_of_text_is_one_document(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / (name + packed)
    assert read(path, PACKED[packed](TEXT.encode())) == ([TEXT], {})
    assert parts_of(str(path)) == parts_of(str(tmp_path)) == [str(path)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.json", '\n[\n  {"text": "one"},\n  {"text": "two"}\n]\n'),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.json", '{"text": "one"}\r\n{"text": "two"}'),
        ("a.json", '["one", "two"]'),
        ("a.ndjson", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.JSONL", '{"text": "one"}\n{"text": "two"}\n'),
    ],
)
def test_json_is_lines_of_records_or_a_list_of_them(tmp_path: Path, name: str, data: str, packed: str) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        assert read(tmp_path / (name + packed), PACKED[packed](mark + data.encode())) == (["one", "two"], {})


def test_a_json_file_may_be_one_record(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "q"}]}
    for indent in (None, 2):
        assert read(tmp_path / "a.json", json.dumps(record, indent=indent).encode()) == (["user: q"], {})


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "READ", 7)
    texts = [f'text {number}, \\ " ] é' for number in range(50)]
    records: list[Any] = [{"text": text, "more": [1, {"a": 2}]} for text in texts]
    for indent in (None, 1):
        found = read(
            tmp_path / "a.json", json.dumps([*records, 12, -3.5e2], indent=indent, ensure_ascii=False).encode()
        )
        assert found == (texts, {"without text": 2})
    cut = json.dumps(records).encode()[:-8]
    assert read(tmp_path / "a.json", cut) == (texts[:-1], {"not JSON": 1})


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": "\\ud800"}', "not UTF-8"),
        ('{"text": ' + DEEP + "}", "nested too deep"),
        ('{"text": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"text": "a', "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "not UTF-8"),
    ],
)
def test_a_record_that_cannot_be_read_is_counted_and_the_others_read(tmp_path: Path, bad: str, reason: str) -> None:
    good = '{"text": "good\\u0000"}'
    lines = read(tmp_path / "a.jsonl", "\n".join([good, bad, good]).encode())
    assert lines == (["good\0"] * 2, {reason: 1})
    assert read(tmp_path / "a.json", "\n".join([good, bad, good]).encode()) == lines
    if reason != "not JSON":  # one that is no JSON takes the rest of a list with it
        assert read(tmp_path / "b.json", f"[{good}, {bad}, {good}]".encode()) == lines


def test_what_is_binary_is_left_out_and_counted(tmp_path: Path) -> None:
    assert read(tmp_path / "a.png", b"\x89PNG\r\n\0\0") == ([], {"binary": 1})
    assert read(tmp_path / "latin-1.txt", "é".encode("latin-1")) == ([], {"not UTF-8": 1})
    assert read(tmp_path / "bom.txt", b"\xef\xbb\xbf" + TEXT.encode()) == ([TEXT], {})
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(100 << 30)
    for name in ("sparse", "sparse.jsonl"):
        (tmp_path / "sparse").rename(tmp_path / name)
        skipped = Skipped()
        assert list(read_documents(str(tmp_path / name), skipped=skipped)) == []
        assert skipped == {"binary": 1}
        (tmp_path / name).rename(tmp_path / "sparse")


def test_a_very_long_file_is_several_documents_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MOST_TEXT", 100)
    monkeypatch.setattr(text_files, "READ", 33)
    lines = [f"{number} é漢" * (number % 9) + "\n" for number in range(60)]
    found, skipped = read(tmp_path / "a.txt", "".join(lines).encode())
    assert "".join(found) == "".join(lines)
    assert all(len(text) <= 100 and text.endswith("\n") for text in found)
    assert read(tmp_path / "b.txt", b"x" * 250)[0] == ["x" * 100, "x" * 100, "x" * 50]
    assert not skipped


def test_a_very_long_record_is_left_out_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_RECORD", 100)
    monkeypatch.setattr(text_files, "READ", 33)
    lines = [json.dumps({"text": text}) for text in ("one", "long" * 100, "two")]
    wanted = (["one", "two"], {"longer than 0 MiB": 1})
    assert read(tmp_path / "a.jsonl", "\n".join(lines).encode()) == wanted


def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in ((Path("/dev/zero"), "device"), *((tmp_path / n, n) for n in ("pipe", "folder", "socket"))):
            with pytest.raises(DataError, match=f"is a {kind}, not a file of text"):
                file_size(path)
            if kind != "folder":
                with pytest.raises(DataError, match=f"is a {kind}, not a file of text"):
                    parts_of(str(path))
    (tmp_path / "folder" / "a.txt").write_text("a")
    assert parts_of(str(tmp_path)) == [str(tmp_path / "folder" / "a.txt")]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_text_cut_short_is_one_clear_error(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    whole = PACKED[packed](os.urandom(4000).hex().encode())
    for data in (whole[: len(whole) // 2], b"no such thing", whole[:4]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"is not whole .*; fetch it again"):
            list(read_documents(str(path)))


def test_files_are_read_in_the_order_of_their_numbers_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("10.txt", "9.txt", "100.txt", "b2/1.txt", "b10/1.txt", ".git/config", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    names = ["9.txt", "10.txt", "100.txt", "b2/1.txt", "b10/1.txt"]
    assert parts_of(str(tmp_path)) == [str(tmp_path / name) for name in names]
    assert parts_of(str(tmp_path / "*.txt")) == [str(tmp_path / name) for name in names[:3]]


def test_a_name_that_is_no_utf8_is_one_clear_error(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as file:
        file.write(b"text")
    for source in (tmp_path, tmp_path / "*", tmp_path / "\udcff.txt"):
        with pytest.raises(DataError, match=r"udcff\.txt' has a name that is no UTF-8; rename it"):
            parts_of(str(source))
    with pytest.raises(DataError, match="names no dataset"):
        parts_of("hub:,config")
