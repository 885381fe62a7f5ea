"""What a command says when it fails: one line, and for a fault of ours a file with all of Python's traceback."""

import io
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import typer

from looplm import __version__
from looplm.errors import LooplmError

DEBUG = "LOOPLM_DEBUG"  # an environment variable: set to 1, it prints tracebacks
LONGEST = 300  # characters of an unexpected error's text


def never_fail_to_print() -> None:
    """Print what the terminal's encoding lacks as an escape (`\\u2581`). The alternative is an error half way."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(error: BaseException) -> None:
    """Print why a command failed: once if torchrun has started many of us on this machine."""
    message = _message(error)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def _message(error: BaseException) -> str:
    """One line about what went wrong and what to do about it."""
    if isinstance(error, LooplmError):
        return _one_line(str(error))
    if isinstance(error, OSError):  # a disk that filled up, a folder that vanished: nothing of ours can mend it
        return _one_line(f"{error.filename or 'the system'}: {error.strerror or error}")
    if _is_out_of_memory(error):
        return (
            f"not enough memory ({_shortened(error)}); take a smaller model, or shorter or fewer rows, or a "
            "machine with more"
        )
    name = type(error).__name__
    return f"unexpected {name} ({_shortened(error)}); this is a fault of looplm, {_where(error)}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of Python, of a GPU, or of torch on a CPU, which raises a bare RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _where(error: BaseException) -> str:
    """Keep the traceback in a file of the user's alone, and say where."""
    rank = f"-rank{os.environ['RANK']}" if "RANK" in os.environ else ""
    prefix = f"looplm-error-{time.strftime('%Y%m%d-%H%M%S')}{rank}-{os.getpid()}-"
    text = f"looplm {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n"
    text += "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix=prefix, suffix=".txt")  # which only the user can read
        os.close(descriptor)
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return f"and no file could be written: {DEBUG}=1 prints its traceback"
    return f"its traceback is in {path} ({DEBUG}=1 prints it)"


def _shortened(error: BaseException) -> str:
    text = _one_line(str(error)) or "no text"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
