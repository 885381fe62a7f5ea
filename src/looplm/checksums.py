"""Checksums of the files of a folder, kept in one small file of it (`COMPLETE`), and what has changed since.

They find what a disk or a copy has damaged. They are no signature: whoever can change a file can change its checksum.
An empty file of checksums comes from before there were any: the folder is whole, and its files are not checked.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from looplm.files import write_whole

logger = logging.getLogger(__name__)

HEADER = "looplm checksums 1, sha256 of the lines below: "
TENSORS = ("*.safetensors", "*.shards/*.safetensors")  # what a reader takes if it is there, listed or not


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file."""

    path: Path
    reason: str
    is_readable: bool = False
    """Whether the file may still be parsed: its reader says more about a length that is wrong than a checksum does."""

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def write_checksums(path: Path, names: Iterable[str]) -> None:
    """Write into `path` the sizes and checksums of files beside it, given by their names relative to its folder."""
    lines = []
    for name in sorted(names):
        file = path.parent / name
        lines.append(f"{_sha256(file)}  {file.stat().st_size}  {name}\n")
    listed = "".join(lines).encode()
    write_whole(path, _header(listed) + listed)


def find_damage(path: Path, *, only: Iterable[str] | None = None) -> Damage | None:
    """The first file that is not as it was when the checksums in `path` were written, None where all are.

    `only` names the files to look at; the others may be large and of no use to the caller.
    """
    try:
        content = path.read_bytes()
        if not content:
            _say_unchecked(path)
            return None
        listed = _listed(content)
        if listed is None:
            return Damage(path, "is damaged: it is not a list of checksums that looplm wrote")
        wanted = listed if only is None else {name: listed[name] for name in only if name in listed}
        for name, (digest, size) in wanted.items():
            file = path.parent / name
            if not file.is_file():
                return Damage(file, f"is missing, and {path.name} lists it", is_readable=True)
            found = file.stat().st_size
            if found != size:
                return Damage(file, f"has {found:,} bytes, and {size:,} were written", is_readable=True)
            if _sha256(file) != digest:
                return Damage(file, f"is damaged: its checksum is not the one in {path.name}")
        if only is None:
            for file in sorted(file for pattern in TENSORS for file in path.parent.glob(pattern)):
                if file.relative_to(path.parent).as_posix() not in listed:
                    return Damage(file, f"was not written with the others: {path.name} does not list it")
    except OSError as error:
        return Damage(Path(error.filename or path), f"cannot be read ({error.strerror or error})")
    return None


def _header(listed: bytes) -> bytes:
    return f"{HEADER}{hashlib.sha256(listed).hexdigest()}\n".encode()


def _listed(content: bytes) -> dict[str, tuple[str, int]] | None:
    """Checksum and size by name, None for what `write_checksums` did not write."""
    header, _, listed = content.partition(b"\n")
    if header + b"\n" != _header(listed):
        return None
    rows = (line.split("  ", 2) for line in listed.decode().split("\n") if line)
    return {name: (digest, int(size)) for digest, size, name in rows}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _say_unchecked(path: Path) -> None:
    """Once a process."""
    logger.warning("%s holds no checksums: the folder was written before there were any, and is not checked", path)
