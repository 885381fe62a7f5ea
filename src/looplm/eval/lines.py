"""Text that a person wrote, a question or prompt a line."""

import sys
from pathlib import Path

from looplm.errors import DataError
from looplm.reading import MOST_BYTES, read_bytes

STDIN = "-"
BOM = "\ufeff".encode()
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def numbered_lines(path: str | Path, *, what: str = "text file") -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1, without their ends; `-` reads standard input. A byte order
    mark is left out.

    Raises:
        DataError: the file cannot be read or is too large, or a line of it is not UTF-8.
    """
    if str(path) == STDIN:
        name, data = "standard input", _stdin()
    else:
        name, data = str(path), read_bytes(Path(path), what=what, error=DataError)
    if data.startswith(UTF16):
        raise DataError(f"{name} is UTF-16; save it as UTF-8")
    found = []
    # other line ends of str.splitlines may stand inside a question, and inside JSON
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the "
                "text as UTF-8"
            ) from None
        if text.strip():
            found.append((number, text))
    return found


def _stdin() -> bytes:
    """All of standard input, as long as it ends."""
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DataError(f"standard input holds more than {MOST_BYTES >> 20} MiB; give fewer lines at a time")
    return data
