"""Files that are replaced whole or not at all, folders with one writer at a time, and the order of names."""

import errno
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from looplm.errors import FolderError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # of a folder that is being written into
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems that have none, as some of clusters do

_held: set[Path] = set()  # folders that this process has locked
_held_guard = threading.Lock()


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place and rename into it, once the disk has it all; an OSError leaves what was there before."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def natural_key(name: str | Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts names with their numbers as numbers: step_200 before step_1000, 9.txt before 10.txt.

    Names that are equal by that (a1 and a01) are ordered as they are spelled, so that the order is always the same.
    """
    text = str(name)
    # Every second piece is a number. Its length, then its digits: int() reads no more than 4,300 of them.
    pieces = [piece.lstrip("0") if index % 2 else piece for index, piece in enumerate(re.split("([0-9]+)", text))]
    return [(len(piece) if index % 2 else 0, piece) for index, piece in enumerate(pieces)], text


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only one that writes into `folder` for as long as the context lasts; the folder is made if it is missing,
    and removed again if nothing was put into it.

    The lock is the operating system's (a POSIX record lock on `folder/.lock`), so a killed process leaves none behind,
    and child processes do not inherit it. One process cannot take it twice, from two threads either.

    Raises:
        FolderError: another process or thread has the folder, or it cannot be written into.
    """
    place = folder.resolve()
    with _held_guard:
        if place in _held:
            raise FolderError(_taken(folder, "another part of this process"))
        _held.add(place)
    missing = [path for path in (place, *place.parents) if not path.exists()]
    try:
        descriptor = _open_locked(folder, place / LOCK)
        try:
            yield
        finally:
            # removed while it is still locked: whoever opened it meanwhile finds that it is no longer the one in place
            (place / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something by now
                path.rmdir()
        _held.discard(place)


def _open_locked(folder: Path, path: Path) -> int:
    """A descriptor of the lock file at `path`, which this process has locked."""
    import fcntl  # not on Windows, where models can still be used

    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FolderError(
                f"{str(folder)!r} cannot be written into ({error.strerror}); give another folder"
            ) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise FolderError(_taken(folder, holder)) from None
            logger.warning("%s is on a file system without locks: start no second process that writes into it", folder)
        # the one before may have removed the file between our opening and locking it
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    with suppress(OSError):  # a full disk: the name of the holder is only for the message
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _taken(folder: Path, holder: str) -> str:
    return f"{str(folder)!r} is being written into by {holder}: wait until it is done, or stop it"
