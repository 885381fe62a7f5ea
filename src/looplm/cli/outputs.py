"""Files that results are written into. What cannot be written is refused before minutes of work, not after."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer

from looplm.errors import ConfigError

STDOUT = Path("-")
PLOTS = (".png", ".svg", ".pdf")


def check_writable(path: Path, *, option: str) -> None:
    """Refuse a place that cannot take the results."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: the folder {str(folder)!r} does not exist; make it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{option} {str(path)!r} cannot be written; give a file in a folder of yours")


def check_ending(path: Path, endings: tuple[str, ...], *, option: str) -> None:
    """Refuse a file whose name says that it is something else."""
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option} {str(path)!r} has to end in {', '.join(endings[:-1])} or {endings[-1]}")


def check_plot(path: Path, *, option: str) -> None:
    """Refuse a plot that cannot be drawn or written."""
    import importlib.util

    check_ending(path, PLOTS, option=option)
    check_writable(path, option=option)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{option} draws with matplotlib, which is not installed: pip install 'looplm[plot]'")


@contextmanager
def stdout_for_json(json_out: Path | None) -> Iterator[None]:
    """With `--json -`, standard output is for the JSON alone: everything else goes to standard error."""
    if json_out != STDOUT:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def check_json(json_out: Path | None) -> None:
    """Refuse a file that `write_json` cannot write."""
    if json_out is not None and json_out != STDOUT:
        check_writable(json_out, option="--json")


def write_json(json_out: Path | None, data: dict[str, Any]) -> None:
    """Write `data` into the file of `--json`, or print it where that is `-`."""
    if json_out is None:
        return
    text = json.dumps(data, indent=1)
    if json_out == STDOUT:
        typer.echo(text)
        return
    write_file(json_out, text.encode(), option="--json")


def write_file(path: Path, data: bytes, *, option: str) -> None:
    """Write results and say so. A file is replaced whole or not at all; a device or pipe is written as it is."""
    from looplm.files import write_whole

    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            write_whole(path, data)
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be written ({error.strerror})") from None
    typer.echo(f"wrote {path}")
