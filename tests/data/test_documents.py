"""Documents: every kind of file, what is left out and counted, and clear errors for what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from looplm.data import documents
from looplm.data.documents import Skipped, parts_of, read_documents, record_text
from looplm.errors import DataError

RECORDS = [{"text": "one"}, {"text": "two\nlines"}, {"text": " "}, {"other": 1}, {"text": "drei, äöü"}]
TEXTS = ["one", "two\nlines", "drei, äöü"]


def write(path: Path, data: bytes) -> str:
    with pa.output_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as file:
        file.write(data)
    return str(path)


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_records_give_their_texts_and_count_what_has_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([{"text": record.get("text")} for record in RECORDS]), path)
    else:
        write(path, lines(RECORDS))
    skipped = Skipped()
    assert list(read_documents(str(path), skipped=skipped)) == TEXTS
    assert skipped == {"empty": 1, "without text": 1}
    assert str(skipped) in ("1 empty, 1 without text", "1 without text, 1 empty")


def test_lines_that_are_no_records_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    data = b'{"text": "a"}\n\n{"text": "cut\n\xff\xfe\n{"text": "b"}\n{"text": "\\ud800"}\n[1]\n'
    skipped = Skipped()
    assert list(read_documents(write(tmp_path / "a.jsonl", data), skipped=skipped)) == ["a", "b"]
    assert skipped == {"not JSON": 1, "not UTF-8": 2, "without text": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.md.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = "A line.\r\n\n  Another, with ß and 漢字.\n"
    assert list(read_documents(write(tmp_path / name, text.encode()))) == [text]
    skipped = Skipped()
    for bad in (b"", b"\xff\xfe"):
        assert list(read_documents(write(tmp_path / name, bad), skipped=skipped)) == []
    assert skipped == {"empty": 1, "not UTF-8": 1}


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("2.txt", "b/1.jsonl", "b/3.parquet", "image.png", "b/x.txt.zst"):
        write(tmp_path / name, b"")
    names = ["2.txt", "b/1.jsonl", "b/3.parquet", "b/x.txt.zst", "image.png"]
    assert parts_of(str(tmp_path)) == [str(tmp_path / name) for name in names]
    assert parts_of(str(tmp_path / "b" / "*.jsonl")) == [str(tmp_path / "b" / "1.jsonl")]
    found = parts_of(str(tmp_path / "**" / "*.jsonl"))
    assert found == [str(tmp_path / "b" / "1.jsonl")]
    assert str(tmp_path / "2.txt") in parts_of(str(tmp_path / "**" / "*.txt"))
    for source, message in (
        (tmp_path / "none", "no such file, folder or glob"),
        (tmp_path / "*.gif", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            parts_of(str(source))
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        parts_of(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("plain", "plain"),
        ({"content": "c"}, "c"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "user: q\nassistant: a",
        ),
        ({"conversations": [{"from": "human", "value": "q"}]}, "human: q"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\ndone"),
        ({"question": "2+2?", "answer": "4"}, "2+2?\n4"),
        ({"answer": "4"}, None),
        (7, None),
    ],
)
def test_records_of_other_shapes(record: Any, text: str | None) -> None:
    assert record_text(record) == text


def test_a_named_field_is_the_only_one_read(tmp_path: Path) -> None:
    skipped = Skipped()
    path = write(tmp_path / "a.jsonl", lines([{"text": "t", "body": "b"}, {"text": "t"}]))
    assert list(read_documents(path, field="body", skipped=skipped)) == ["b"]
    assert skipped == {"without body": 1}


def test_what_is_cut_short_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"no zstd at all")
    with pytest.raises(DataError, match="is not whole zstd"):
        list(read_documents(str(tmp_path / "a.txt.zst")))
    path = Path(write(tmp_path / "b.jsonl.zst", lines([{"text": str(number)} for number in range(40000)])))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="is not whole zstd"):
        list(read_documents(str(path)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="is not a whole parquet file"):
        list(read_documents(str(tmp_path / "a.parquet")))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(str(tmp_path / "none.txt")))


def test_a_dataset_is_streamed_as_from_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(RECORDS))
    write(tmp_path / "validation.jsonl", lines([{"text": "v"}]))
    assert list(read_documents(f"hub:{tmp_path}")) == TEXTS
    assert list(read_documents(f"hub:{tmp_path},,validation")) == ["v"]
    with pytest.raises(DataError, match="more than a dataset, its config and its split"):
        parts_of("hub:some/thing,config,train,test")
    with pytest.raises(DataError, match=r"stopped answering after 0 rows.*check its name"):
        list(read_documents(f"hub:{tmp_path / 'none'}"))


def test_a_stream_that_breaks_is_taken_up_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        def __init__(self, start: int = 0) -> None:
            self.start = start

        def skip(self, n: int) -> "Rows":
            return Rows(n)

        def __iter__(self) -> Any:
            for number in range(self.start, 6):
                if number == 4 and self.start < 3:
                    raise ConnectionError("reset by peer")
                yield {"text": str(number)}

    class Datasets:
        @staticmethod
        def load_dataset(*args: Any, **options: Any) -> Rows:
            return Rows()

    monkeypatch.setattr(documents, "extra", lambda name, what: Datasets)
    assert list(read_documents("hub:some/thing")) == list("012345")


def test_the_standard_library_is_there_without_a_download() -> None:
    skipped = Skipped()
    found = list(read_documents("builtin:python", skipped=skipped))
    assert len(found) > 500
    assert any(text.startswith('"""JSON') or "json" in text for text in found)
    assert all(text.strip() for text in found)
