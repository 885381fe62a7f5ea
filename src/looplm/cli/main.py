"""The `looplm` command: it runs the command line, and ends with one line where that fails.

Nothing is imported before `main` runs, so that Ctrl-C is quiet from the beginning.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141  # exit statuses; the latter two are those that shells give for a signal
UNSAFE_IMPORTS = ("numpy", "torch")


def main() -> None:
    """Run the command line. Mistakes and faults are told in one line, and Ctrl-C ends a command without any."""
    try:
        import signal
        import threading

        is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if not is_ours:
            _run()
            return
        signal.signal(signal.SIGINT, _interrupt)
        try:
            _run()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _interrupt(number: int, frame: "FrameType | None") -> None:
    """What Ctrl-C does. While native code is being loaded an exception would end in an abort, or in another error."""
    for name in UNSAFE_IMPORTS:
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "_initializing", False):
            import os

            os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _run() -> None:
    try:
        import os

        # torch asks for huge pages when it allocates large tensors: fresh memory is dear where pages are small
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        from looplm.cli.app import app
        from looplm.cli.failures import never_fail_to_print

        never_fail_to_print()
        app()
    except KeyboardInterrupt:
        raise
    except SystemExit as error:  # how typer ends every command, one whose reader has gone away too
        if isinstance(error.__context__, BrokenPipeError):
            sys.exit(BROKEN_PIPE)
        raise
    except BaseException as error:  # a panic in native code is no Exception
        from looplm.cli.failures import tell

        tell(error)
        sys.exit(FAILED)
