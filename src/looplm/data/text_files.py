"""Files of text, plain or compressed, read piece by piece: however large a file is, little of it is in memory.

What a file cannot give (bytes that are no UTF-8, a line that is no JSON) is counted, and reading continues after it.
A byte order mark is no part of the text.
"""

import codecs
import io
import json
import lzma
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from looplm.data.records import Skipped
from looplm.errors import DataError

COMPRESSED = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson")
READ = 1 << 20  # bytes at a time
MOST_TEXT = 1 << 26  # characters of one document: a longer file is read as several
MOST_RECORD = 1 << 27  # bytes of one record
FIRST_LINES = 100  # of a .json file; if one of them is a record, all of them are lines of records

_BETWEEN = re.compile(r"[\s,]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)


def file_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is not there, or is a device, a pipe or a folder.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error.strerror})") from None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise DataError(f"{str(path)!r} is {kind}, not a file of text")
    return found.st_size


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, or what a compressed one holds.

    Raises:
        DataError: it cannot be read, is no regular file, or is cut short.
    """
    file_size(path)
    kind = COMPRESSED.get(path.suffix.lower())
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        what = "cannot be read" if kind is None else f"is not whole {kind}"
        mend = "" if kind is None else "; fetch it again"
        raise DataError(f"{str(path)!r} {what} ({getattr(error, 'strerror', None) or error}){mend}") from None


def _open(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".gz":
        import gzip

        return gzip.open(path, "rb")
    if kind == ".bz2":
        import bz2

        return bz2.open(path, "rb")
    if kind == ".xz":
        return lzma.open(path, "rb")
    if kind == ".zst":
        arrow = extra("pyarrow", what=f"{str(path)!r} is compressed")
        return io.BufferedReader(arrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def extra(name: str, *, what: str) -> Any:
    """A package of the `data` extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DataError(f"{what} and reading it takes {name}: pip install 'looplm[data]'") from None


def read_text(path: Path, skipped: Skipped) -> Iterator[str]:
    """The text of a file: one document, or documents of MOST_TEXT characters, cut at line ends."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pieces: list[str] = []
    n_kept, at_end = 0, False
    with opened(path) as file:
        while not at_end:
            data = file.read(READ)
            at_end = not data
            if b"\0" in data:
                skipped["binary"] += 1
                return
            try:
                pieces.append(decoder.decode(data, final=at_end))
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
                return
            n_kept += len(pieces[-1])
            if n_kept > MOST_TEXT:
                text = "".join(pieces)
                cut = text.rfind("\n", 0, MOST_TEXT) + 1 or MOST_TEXT
                yield text[:cut]
                pieces, n_kept = [text[cut:]], len(text) - cut
    yield "".join(pieces)


def read_records(path: Path, skipped: Skipped) -> Iterator[Any]:
    """What a file of JSON holds: lines of it, a list, or one record."""
    name = path.with_suffix("").name if path.suffix.lower() in COMPRESSED else path.name
    if name.lower().endswith(JSON_LINES):
        yield from _lines(path, skipped)
        return
    with opened(path) as file:
        head = file.read(READ).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from _listed(path, skipped)
    elif any(line.startswith(b"{") and _is_json(line) for line in head.split(b"\n", FIRST_LINES)[:FIRST_LINES]):
        yield from _lines(path, skipped)
    else:
        with opened(path) as file:
            data = file.read(MOST_RECORD + 1)
        yield from _parsed(data, skipped)


def _is_json(line: bytes) -> bool:
    return bool(list(_parsed(line, Skipped())))


def _parsed(data: bytes, skipped: Skipped) -> Iterator[Any]:
    """The record that a line is, if it is one."""
    if len(data) > MOST_RECORD:
        skipped[f"longer than {MOST_RECORD >> 20} MiB"] += 1
        return
    try:
        text = data.decode("utf-8-sig")
        record = json.loads(text) if text.strip() else None
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
    except RecursionError:
        skipped["nested too deep"] += 1
    except ValueError:
        skipped["not JSON"] += 1
    else:
        if text.strip():
            yield record


def _lines(path: Path, skipped: Skipped) -> Iterator[Any]:
    with opened(path) as file:
        while line := file.readline(MOST_RECORD + 1):
            rest = line
            while len(line) > MOST_RECORD and rest and not rest.endswith(b"\n"):
                if b"\0" in rest:  # no text at all: the end of it may be far away
                    skipped["binary"] += 1
                    return
                rest = file.readline(READ)
            yield from _parsed(line, skipped)


def _listed(path: Path, skipped: Skipped) -> Iterator[Any]:
    """The records of one long list, without the whole of it in memory."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape"), json.JSONDecoder().raw_decode
    with opened(path) as file:
        text, at_end = decoder.decode(file.read(READ)), False
        at = text.index("[") + 1
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", at):
                return
            try:
                record, end = scan(text, at)
                reason = None
            except RecursionError:
                record, end, reason = None, _end_of(text, at), "nested too deep"
            except ValueError:
                record, end, reason = None, len(text), "not JSON"
            if end < len(text):  # else it may continue
                at = end
                if reason is None:
                    yield record
                else:
                    skipped[reason] += 1
            elif at_end or len(text) - at > MOST_RECORD:
                skipped["not JSON" if at_end else f"longer than {MOST_RECORD >> 20} MiB"] += 1
                return
            else:
                data = file.read(max(READ, len(text) - at))  # as much again, so that trying anew stays cheap
                at_end = not data
                text, at = text[at:] + decoder.decode(data, final=at_end), 0


def _end_of(text: str, start: int) -> int:
    """Where the list or mapping that begins at `start` ends; the end of `text` if that is later."""
    depth = 0
    for found in _STRUCTURE.finditer(text, start):
        mark = found.group()
        depth += (mark in "[{") - (mark in "]}")
        if not depth:
            return found.end()
    return len(text)
