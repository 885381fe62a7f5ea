"""How a command ends: one line for a fault, a file with its traceback, exit statuses, Ctrl-C at any time."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import fails, looplm
from looplm import __version__
from looplm.cli import app as cli
from looplm.errors import ConfigError

# Sends Ctrl-C to itself when the module named first is imported, then runs the command line.
INTERRUPT_AT = """
import os, signal, sys
name = sys.argv.pop(1)
class Finder:
    def find_spec(self, found, path=None, target=None):
        if found == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from looplm.cli.main import main
main()
"""


class PanicException(BaseException):
    """What native code raises (pyo3), no Exception."""


def endless() -> None:
    endless()


def raises(error: BaseException) -> Callable[[], None]:
    def app() -> None:
        raise error

    return app


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "app",
    [
        raises(IndexError("list index\nout of range")),
        raises(PanicException("called `Option::unwrap()` on a `None` value")),
        raises(ValueError()),
        endless,
    ],
    ids=["exception", "panic", "without text", "recursion"],
)
def test_an_unexpected_error_is_one_line_and_a_private_file(
    app: Callable[[], None], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "app", app)
    done = looplm("config")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unexpected ")
    assert "LOOPLM_DEBUG=1" in line
    found = re.search(r"traceback is in (\S+)", line)
    assert found is not None
    path = Path(found[1])
    assert path.parent == temporary
    assert str(os.getpid()) in path.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert "Traceback (most recent call last)" in text
    assert "looplm config" in text


def test_a_traceback_that_cannot_be_kept_is_still_one_line(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr(cli, "app", raises(IndexError("list index")))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    assert "LOOPLM_DEBUG=1" in fails("config")


def test_debugging_prints_the_traceback_before_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raises(IndexError("list index")))
    monkeypatch.setenv("LOOPLM_DEBUG", "1")
    lines = looplm("config").stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: unexpected IndexError")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_said_with_the_mend(
    error: Exception, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "app", raises(error))
    assert "not enough memory" in fails("config")
    assert not list(temporary.iterdir())


def test_a_mistake_with_line_ends_in_its_text_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raises(ConfigError("no preset\nof this name")))
    assert fails("config") == "error: no preset of this name"


def test_one_rank_of_a_machine_speaks(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raises(IndexError("list index")))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")
    done = looplm("config")
    assert (done.returncode, done.stderr) == (1, "")
    (kept,) = temporary.iterdir()
    assert "rank3" in kept.name


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raises(KeyboardInterrupt()))
    done = looplm("config")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_has_gone_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "looplm", "config"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_under_the_output_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert fails("config") == "error: the system: No space left on device"


@pytest.mark.parametrize("module", ["typer", "looplm.cli.app", "torch", "torch.nn"])
def test_ctrl_c_while_libraries_load_is_quiet(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPT_AT, module, "generate", "builtin:reasoner", "--prompt", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_curves_are_drawn_in_ascii_where_output_is(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 3.0 - step, "progress": 0.5} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "samples.txt").write_text("step 2: 'é'\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "looplm", "watch", str(tmp_path), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "#_" in done.stdout
    assert r"\xe9" in done.stdout


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(option: str) -> None:
    done = looplm(option)
    assert (done.returncode, done.stdout) == (0, f"looplm {__version__}\n")


def test_a_command_that_does_not_exist_names_the_nearest() -> None:
    done = looplm("generat")
    assert done.returncode == 2
    assert "'generate'" in done.stderr
