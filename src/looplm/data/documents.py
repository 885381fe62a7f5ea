"""Texts to learn from, read one document at a time: files of any kind of text, Hugging Face datasets, and the Python
standard library, which is on every machine that runs this.

A source is a string: a file, a folder or a glob (`corpus/*.jsonl.zst`), `hub:NAME` or `hub:NAME,CONFIG,SPLIT` for a
dataset that `datasets` streams (an empty CONFIG is the default one; NAME may be a local folder), or `builtin:python`.
What cannot be read as a document (a binary file, a line that is no JSON, bytes that are no UTF-8, an empty text) is
skipped and counted, never passed on changed.
"""

import glob
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from looplm.data.records import Skipped, record_text
from looplm.data.text_files import COMPRESSED, JSON_LINES, extra, file_size, read_records, read_text
from looplm.errors import DataError
from looplm.files import natural_key

HUB, BUILTIN_PYTHON = "hub:", "builtin:python"
RECORDS = (*JSON_LINES, ".json")  # also compressed
PARQUET = ".parquet"
TRIES = 3  # of a hub that does not answer


def parts_of(source: str) -> list[str]:
    """The files of a source, numbers in their names as numbers; a dataset of the hub or a built-in corpus is one part.

    Raises:
        DataError: nothing is there, or it is no regular file.
    """
    if source.startswith(HUB) and not source.removeprefix(HUB).partition(",")[0].strip():
        raise DataError(f"{source!r} names no dataset: {HUB}NAME,CONFIG,SPLIT")
    if source.startswith(HUB) and source.count(",") > 2:
        raise DataError(f"{source!r} names more than a dataset, its config and its split: {HUB}NAME,CONFIG,SPLIT")
    if not is_file(source):
        return [source]
    path = Path(source)
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.is_file() and not _is_hidden(each.relative_to(path))]
        if not found:
            raise DataError(f"folder {source!r} holds no files; hidden ones do not count")
        return _in_order(map(str, found))
    if path.exists():
        file_size(path)
        return _in_order([source])
    matches = [each for each in glob.glob(source, recursive=True) if Path(each).is_file()]
    if not matches:
        known = f"; or name a dataset as {HUB}NAME, or {BUILTIN_PYTHON}"
        raise DataError(f"source {source!r}: no such file, folder or glob{known}")
    return _in_order(matches)


def _in_order(names: Iterable[str]) -> list[str]:
    """Names with their numbers as numbers."""
    found = sorted(names, key=natural_key)
    for name in found:
        if not _is_utf8(name):  # it could not be written into a manifest
            raise DataError(f"{name!r} has a name that is no UTF-8; rename it")
    return found


def is_file(part: str) -> bool:
    """Whether a part is a file, not a dataset or a built-in corpus."""
    return not part.startswith(HUB) and part != BUILTIN_PYTHON


def _is_hidden(path: Path) -> bool:
    """Whether a name on the way to it begins with a dot, as in .git: a glob passes over those too."""
    return any(part.startswith(".") for part in path.parts)


def read_documents(part: str, *, field: str | None = None, skipped: Skipped | None = None) -> Iterator[str]:
    """The documents of one part, in order. A file of records (JSON lines, JSON, parquet) gives a document a record, as
    `record_text` reads them; any other file is one document, or several if it is very long.

    Raises:
        DataError: the file cannot be opened, is cut short, or the hub does not answer.
    """
    counted = Skipped() if skipped is None else skipped
    for text in _read(part, field, counted):
        if not text.strip():
            counted["empty"] += 1
        elif not _is_utf8(text):
            counted["not UTF-8"] += 1
        else:
            yield text


def _is_utf8(text: str) -> bool:
    """Whether a text has bytes: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(part: str, field: str | None, skipped: Skipped) -> Iterator[str]:
    if part == BUILTIN_PYTHON:
        yield from _python(skipped)
    elif part.startswith(HUB):
        yield from _texts(_hub(part), field, skipped)
    elif part.lower().endswith(PARQUET):
        yield from _texts(_parquet(Path(part), skipped), field, skipped)
    elif _plain_name(part).endswith(RECORDS):
        yield from _texts(read_records(Path(part), skipped), field, skipped)
    else:
        yield from read_text(Path(part), skipped)


def _plain_name(part: str) -> str:
    """A file's name in small letters, without the ending that says how it is compressed."""
    name = part.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def _parquet(path: Path, skipped: Skipped) -> Iterator[Any]:
    arrow, parquet = extra("pyarrow", what=f"{str(path)!r} is parquet"), extra("pyarrow.parquet", what="")
    file_size(path)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from _rows(batch, skipped)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} is not a whole parquet file ({error}); fetch it again") from None


def _rows(batch: Any, skipped: Skipped) -> Iterator[Any]:
    """Records of some rows; a text that is no UTF-8 costs its own row alone."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            skipped["not UTF-8"] += 1
        else:
            for row in range(batch.num_rows):
                yield from _rows(batch.slice(row, 1), skipped)


def _hub(part: str) -> Iterator[Any]:
    """Rows of a dataset, streamed. A stream that breaks is taken up where it was, a few times."""
    datasets = extra("datasets", what=f"{part!r} is a dataset")
    name, config, split = (*part.removeprefix(HUB).split(","), "", "")[:3]
    n_given, n_failed = 0, 0
    while True:
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for row in rows.skip(n_given) if n_given else rows:
                yield row
                n_given, n_failed = n_given + 1, 0
            return
        except Exception as error:  # whatever a network, a server or a dataset's files may raise
            n_failed += 1
            if n_failed == TRIES:
                raise DataError(
                    f"dataset {part!r} stopped answering after {n_given:,} rows ({type(error).__name__}: {error}); "
                    "check its name and the network, then run the command again: what is done is kept"
                ) from None


def _texts(records: Iterable[Any], field: str | None, skipped: Skipped) -> Iterator[str]:
    for record in records:
        text = record_text(record, field=field, skipped=skipped)
        if text is not None:
            yield text


def _python(skipped: Skipped) -> Iterator[str]:
    """The running Python's standard library: its source, without tests and installed packages, and the pages of its
    language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield from read_text(path, skipped)
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
