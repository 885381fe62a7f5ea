"""Texts to learn from, read one document at a time: files of several kinds, Hugging Face datasets, and the Python
standard library, which is on every machine that runs this.

A source is a string: a file, a folder or a glob (`corpus/*.jsonl.zst`), `hub:NAME` or `hub:NAME,CONFIG,SPLIT` for a
dataset that `datasets` streams (an empty CONFIG is the default one; NAME may be a local folder), or `builtin:python`.
What cannot be read as a document (a line that is no JSON, bytes that are no UTF-8, an empty text) is skipped and
counted, never passed on changed.
"""

import glob
import io
import json
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from looplm.data.records import Skipped, record_text
from looplm.errors import DataError

HUB, BUILTIN_PYTHON = "hub:", "builtin:python"
KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")  # of files in a folder; each also with .zst, parquet not
TRIES = 3  # of a hub that does not answer


def parts_of(source: str) -> list[str]:
    """The files of a source, in order; a dataset of the hub or a built-in corpus is one part.

    Raises:
        DataError: nothing is there, or it is of no known kind.
    """
    if source.startswith(HUB) and source.count(",") > 2:
        raise DataError(f"{source!r} names more than a dataset, its config and its split: {HUB}NAME,CONFIG,SPLIT")
    if source.startswith(HUB) or source == BUILTIN_PYTHON:
        return [source]
    path = Path(source)
    if path.is_dir():
        found = sorted(str(each) for each in path.rglob("*") if each.is_file() and _kind(each) is not None)
        if not found:
            raise DataError(f"folder {source!r} holds no text; files end in {', '.join(KINDS)}, or these and .zst")
        return found
    matches = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    found = [each for each in matches if Path(each).is_file()]
    if not found:
        known = f"; or name a dataset as {HUB}NAME, or {BUILTIN_PYTHON}"
        raise DataError(f"source {source!r}: no such file, folder or glob{known}")
    for each in found:
        if _kind(Path(each)) is None:
            raise DataError(f"{each!r} is of no known kind; files end in {', '.join(KINDS)}, or these and .zst")
    return found


def read_documents(part: str, *, field: str | None = None, skipped: Skipped | None = None) -> Iterator[str]:
    """The documents of one part, in order. A plain text file is one document; records give their `field`, or text,
    content, messages, instruction with output, whichever they have first.

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


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".zst")
    kind = next((kind for kind in KINDS if name.endswith(kind)), None)
    return None if kind == ".parquet" and path.suffix == ".zst" else kind


def _read(part: str, field: str | None, skipped: Skipped) -> Iterator[str]:
    if part == BUILTIN_PYTHON:
        yield from _python(skipped)
    elif part.startswith(HUB):
        yield from _texts(_hub(part), field, skipped)
    elif part.endswith(".parquet"):
        yield from _texts(_parquet(Path(part)), field, skipped)
    elif _kind(Path(part)) == ".jsonl":
        yield from _texts(_json_lines(Path(part), skipped), field, skipped)
    else:
        yield from _whole(Path(part), skipped)


def _whole(path: Path, skipped: Skipped) -> Iterator[str]:
    with _opened(path) as file:
        read = file.read()
    try:
        yield read.decode()
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1


def _json_lines(path: Path, skipped: Skipped) -> Iterator[Any]:
    with _opened(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
            except ValueError:
                skipped["not JSON"] += 1


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file or what a .zst holds; its faults as a DataError."""
    try:
        if path.suffix == ".zst":
            arrow = _extra("pyarrow", what=f"{str(path)!r} is compressed")
            with arrow.input_stream(str(path), compression="zstd") as file:
                yield io.BufferedReader(file)
        else:
            with path.open("rb") as file:
                yield file
    except OSError as error:
        is_cut = path.suffix == ".zst" and path.is_file()
        mend = "is not whole zstd" if is_cut else "cannot be read"
        raise DataError(f"{str(path)!r} {mend} ({error.strerror or error})") from None


def _parquet(path: Path) -> Iterator[Any]:
    arrow, parquet = _extra("pyarrow", what=f"{str(path)!r} is parquet"), _extra("pyarrow.parquet", what="")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} is not a whole parquet file ({error}); fetch it again") from None


def _hub(part: str) -> Iterator[Any]:
    """Rows of a dataset, streamed. A stream that breaks is taken up where it was, a few times."""
    datasets = _extra("datasets", what=f"{part!r} is a dataset")
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
    """The running Python's standard library: its source, tests and packages installed beside it left out, and the pages
    of its language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield from _whole(path, skipped)
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _extra(name: str, *, what: str) -> Any:
    """A package of the `data` extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DataError(f"{what} and reading it takes {name}: pip install 'looplm[data]'") from None
