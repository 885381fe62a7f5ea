"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) that lose nothing.

Signals reach the main thread alone, so in any other one they are left as they are. SIGHUP that is ignored stays
ignored: that is what `nohup` asks for.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

WITH_PARENT = "LOOPLM_ENDS_WITH_PARENT"  # set for training that another command of ours has started
AT_ONCE_AFTER = 2.0  # seconds: two quick presses are one, and torchrun passes on what the terminal has sent already


@contextmanager
def interruptible(*, is_quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """A signal asks the loop to stop after its step, which the yielded function tells; another Ctrl-C seconds later
    ends the program at once. The loop has to stop as well when the torchrun or `looplm compare` above it is gone."""
    asked_at: float | None = None
    is_child = "TORCHELASTIC_RUN_ID" in os.environ or WITH_PARENT in os.environ
    parent = os.getppid()

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            if signum == signal.SIGINT and not is_quiet:
                # not print: the signal may have come while something was being printed
                os.write(2, b"\nstopping after this step; press Ctrl-C again to end without saving\n")
        elif signum == signal.SIGINT and time.monotonic() - asked_at > AT_ONCE_AFTER:
            raise KeyboardInterrupt

    with _handling({signal.SIGINT: ask, signal.SIGTERM: ask, signal.SIGHUP: ask}):
        yield lambda: asked_at is not None or (is_child and os.getppid() != parent)


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does, so that what was started is ended too."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: end, signal.SIGHUP: end}):
        yield


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals by the given functions for as long as the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
