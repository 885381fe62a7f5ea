"""Threads that compile and threads that compute take turns."""

from collections.abc import Callable
from threading import Event, Thread

import pytest

from looplm.model.compiler import Turns

WAIT = 20.0  # seconds at most, where something has to happen
SHORT = 0.05  # seconds in which nothing may happen


def started(work: Callable[[], None]) -> tuple[Thread, Event]:
    """A thread that does this, and whether it is done."""
    done = Event()

    def run() -> None:
        work()
        done.set()

    thread = Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def forward(turns: Turns) -> None:
    with turns.forward():
        pass


def compilation(turns: Turns) -> None:
    with turns.compilation():
        pass


def test_a_compilation_waits_for_the_forwards_of_other_threads_and_holds_up_new_ones() -> None:
    turns = Turns()
    with turns.forward():
        assert started(lambda: forward(turns))[1].wait(WAIT)  # beside this one
        _, compiled = started(lambda: compilation(turns))
        assert not compiled.wait(SHORT)
        _, later = started(lambda: forward(turns))
        assert not later.wait(SHORT)
        with turns.forward():  # one that is part of another never waits
            pass
    assert compiled.wait(WAIT)
    assert later.wait(WAIT)


def test_nothing_runs_beside_a_compilation() -> None:
    turns = Turns()
    with turns.compilation():
        others = [started(lambda: forward(turns))[1], started(lambda: compilation(turns))[1]]
        with turns.forward(), turns.compilation():  # what is compiled runs forwards, and compiles their parts
            pass
        assert not any(done.wait(SHORT) for done in others)
    assert all(done.wait(WAIT) for done in others)


def test_forwards_that_both_want_to_compile_do_so_one_after_another() -> None:
    turns, inside, go = Turns(), [Event(), Event()], Event()
    running: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with turns.forward():
            inside[number].set()
            go.wait(WAIT)
            with turns.compilation():
                running.append(number)
                most.append(len(running))
                Event().wait(SHORT)
                running.remove(number)

    both = [started(lambda number=number: work(number))[1] for number in (0, 1)]  # type: ignore[misc]
    assert all(event.wait(WAIT) for event in inside)
    go.set()
    assert all(done.wait(WAIT) for done in both)
    assert most == [1, 1]


def test_a_compilation_that_fails_lets_others_go_on() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.forward(), turns.compilation():
        raise ZeroDivisionError
    assert started(lambda: compilation(turns))[1].wait(WAIT)
    assert started(lambda: forward(turns))[1].wait(WAIT)
