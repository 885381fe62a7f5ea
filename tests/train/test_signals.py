"""Signals lose nothing: Ctrl-C once or twice, a closed terminal, the end of what started a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from looplm.checkpoint import checkpoints
from looplm.config import to_yaml
from looplm.telemetry.sinks import Record
from looplm.train import interrupt
from looplm.train.interrupt import ending_like_ctrl_c, interruptible
from looplm.train.run import resolve_run, start_run


def send(*numbers: signal.Signals, at: int) -> Callable[[Record], None]:
    """An observer that sends signals to this process after a step."""

    def observe(record: Record) -> None:
        if record["step"] == at:
            for number in numbers:
                os.kill(os.getpid(), number)

    return observe


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGTERM,),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    ],
    ids=str,
)
def test_signals_save_a_checkpoint(tmp_path: Path, tiny_reason: list[str], numbers: tuple[signal.Signals, ...]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    config = resolve_run("reason", overrides=tiny_reason)
    result = start_run(config, tmp_path / "run", observers=(send(*numbers, at=2),))
    assert result.interrupted
    assert result.checkpoint.name == "step-00000002"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_another_ctrl_c_later_ends_at_once_and_says_what_is_kept(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands import looplm

    monkeypatch.setattr(interrupt, "AT_ONCE_AFTER", -1.0)

    class Impatient:
        def __init__(self, *given: object) -> None: ...
        def __enter__(self) -> "Impatient":
            return self

        def __exit__(self, *given: object) -> None: ...
        def say(self, stage: str) -> None: ...
        def __call__(self, record: Record) -> None:
            send(signal.SIGINT, signal.SIGINT, at=5)(record)

    monkeypatch.setattr("looplm.cli.progress.TrainingProgress", Impatient)
    done = looplm("train", "reason", *tiny_reason, "train.checkpoint_steps=2", "--out", tmp_path / "run")
    assert done.returncode == 130
    assert "stopped at once; kept: " in done.stderr
    assert "step-00000004; continue with: looplm train --resume" in done.stderr


def test_an_ignored_hangup_stays_ignored() -> None:
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(is_quiet=True) as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with ending_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone() -> None:
    found: list[bool] = []

    def enter() -> None:
        with interruptible() as interrupted, ending_like_ctrl_c():
            found.append(interrupted())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_is_to_stop_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with interruptible() as interrupted:
        assert not interrupted()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interrupted()
    monkeypatch.undo()
    with interruptible() as interrupted:  # what a shell started outlives the shell
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not interrupted()


@contextmanager
def comparing(folder: Path, tiny_reason: list[str]) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A comparison, once its first training has saved a checkpoint, and that training's folder."""
    changes = [each for each in tiny_reason if "steps" not in each and "minutes" not in each]
    recipe = folder / "recipe.yaml"
    changes += ["train.steps=100000", "train.checkpoint_steps=1", "model.n_loops=2"]
    recipe.write_text(to_yaml(resolve_run("reason", overrides=changes)))
    command = [sys.executable, "-m", "looplm", "compare", str(recipe), "--minutes", "40", "--out", str(folder / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            deadline = time.monotonic() + 240
            while not (found := list(folder.glob("out/runs/*/checkpoints/step-*/COMPLETE"))):
                assert time.monotonic() < deadline
                assert running.poll() is None
                time.sleep(0.2)
            yield running, found[0].parents[2]
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)


def assert_ends(run: Path) -> None:
    """The training in `run` ends: its lock is free and it writes no more."""
    deadline = time.monotonic() + 60
    while (run / ".lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    before = checkpoints(run)
    time.sleep(1)
    assert checkpoints(run) == before


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_comparison_that_is_ended_ends_its_training(
    tmp_path: Path, tiny_reason: list[str], number: signal.Signals
) -> None:
    with comparing(tmp_path, tiny_reason) as (running, run):
        running.send_signal(number)  # to the command alone, not to its group
        _, error = running.communicate(timeout=120)
        assert running.returncode == 130
        assert "what was trained is kept" in error
        assert_ends(run)
        assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.long
def test_a_comparison_that_is_killed_does_not_leave_its_training_behind(tmp_path: Path, tiny_reason: list[str]) -> None:
    with comparing(tmp_path, tiny_reason) as (running, run):
        running.kill()
        assert_ends(run)
