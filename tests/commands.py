"""The `looplm` command, called in this process (no second import of torch) or as a process of its own.

In the process is right wherever only output, files and the exit status matter. Signals, two jobs at once, start-up and
what a terminal shows need a process.
"""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from looplm.cli.main import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def looplm(*words: str | Path, text: str | bytes | None = None) -> Done:
    """Run the command in this process, with `text` as its standard input. Output is never a terminal's."""
    given = text.encode() if isinstance(text, str) else (text or b"")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    n_threads, environment, status = torch.get_num_threads(), dict(os.environ), 0
    argv = ["looplm", *map(str, words)]
    try:
        with (
            patch.object(sys, "argv", argv),
            patch.object(sys, "stdin", stdin),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:  # a command may choose threads and set variables for its own process
        torch.set_num_threads(n_threads)
        os.environ.clear()
        os.environ.update(environment)
    printed = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return Done(status, *printed)


def succeeds(*words: str | Path, text: str | bytes | None = None) -> str:
    """Standard output of a command that has to end well."""
    done = looplm(*words, text=text)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*words: str | Path, text: str | bytes | None = None) -> str:
    """The error of a command that has to end with one: a single line, exit status 1."""
    done = looplm(*words, text=text)
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


def process(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own."""
    command = [sys.executable, "-m", "looplm", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=300)
