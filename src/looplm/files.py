"""Files that are replaced whole or not at all, and the order of their names."""

import os
import re
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place and rename into it, once the disk has it all; an OSError leaves what was there before."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def natural_key(name: str | Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts names with their numbers as numbers: step_200 before step_1000, 9.txt before 10.txt.

    Names that are equal by that (a1 and a01) are ordered as they are spelled, so that the order is always the same.
    """
    text = str(name)
    # Every second piece is a number. Its length, then its digits: int() reads no more than 4,300 of them.
    pieces = [piece.lstrip("0") if index % 2 else piece for index, piece in enumerate(re.split("([0-9]+)", text))]
    return [(len(piece) if index % 2 else 0, piece) for index, piece in enumerate(pieces)], text
