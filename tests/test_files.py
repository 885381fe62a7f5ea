"""One process at a time writes into a folder, and numbers in names are numbers."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from looplm.errors import FolderError
from looplm.files import LOCK, lock_folder, natural_key

HOLD = """
import sys, time
from pathlib import Path
from looplm.files import lock_folder, natural_key
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FolderError, match=f"run.*process {holder.pid} on") as refused, lock_folder(folder):
            pass
        assert "\n" not in str(refused.value)
        os.kill(holder.pid, signal.SIGKILL)
    with lock_folder(folder):
        pass


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with lock_folder(tmp_path / "run"):
                found.append("locked")
        except FolderError as error:
            found.append(str(error))

    with lock_folder(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert "another part of this process" in found[0]
    second()
    assert found[1] == "locked"


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """Workers may outlive a killed trainer for a moment."""
    with lock_folder(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "new" / "run"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
        assert (tmp_path / "run" / LOCK).exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_into_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot be written into"), lock_folder(tmp_path / "file"):
        pass
    with pytest.raises(FolderError, match="cannot be written into"), lock_folder(tmp_path / "file" / "below"):
        pass


def test_numbers_in_names_are_compared_as_numbers() -> None:
    names = ["step_1000", "step_200", "model_1000000.pt", "model_999999.pt", "a2b10", "a2b9", "a10b1", "a"]
    assert sorted(names, key=natural_key) == [
        *("a", "a2b9", "a2b10", "a10b1"),
        *("model_999999.pt", "model_1000000.pt"),
        *("step_200", "step_1000"),
    ]
    assert sorted([Path("x/10.txt"), Path("x/9.txt")], key=natural_key) == [Path("x/9.txt"), Path("x/10.txt")]


def test_the_natural_order_is_total_and_takes_any_number_of_digits() -> None:
    names = ["a01", "a1", "a001", "b", "", "1"]
    assert sorted(names, key=natural_key) == ["", "1", "a001", "a01", "a1", "b"]
    assert sorted(["1" * 6000, "9" * 5999], key=natural_key) == ["9" * 5999, "1" * 6000]
