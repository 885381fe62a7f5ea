"""What is shown of a run while it trains: a bar in a terminal, a line now and then elsewhere."""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from looplm.telemetry.sinks import Record

SECONDS_BETWEEN_LINES = 30.0
BY_LOOPS = "loss_mean_"  # and the number of loops, in a record


class TrainingProgress:
    """An observer of `fit`: the stages of its start, then loss (a mean of the last steps, by number of loops where they
    differ), tokens/s and time left."""

    def __init__(self, label: str = "training") -> None:
        self.is_terminal = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self.label = label
        self._started = time.perf_counter()
        self._first: tuple[float, float] | None = None
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task(label, total=1.0, numbers="reading the data")

    def __enter__(self) -> "TrainingProgress":
        if self.is_terminal:
            self._bar.start()
        self.say("reading the data")
        return self

    def say(self, stage: str) -> None:
        """Show what the start is at."""
        self._bar.update(self._task, numbers=stage)
        if not self.is_terminal and os.environ.get("RANK", "0") == "0":
            print(f"{self.label}: {stage}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_terminal:
            self._bar.stop()

    def __call__(self, record: Record) -> None:
        elapsed = time.perf_counter() - self._started
        progress = float(record["progress"])
        if self._first is None:
            self._first = (elapsed, progress)  # after probing and compiling, and where a resumed run stood
        gained = progress - self._first[1]
        left = (elapsed - self._first[0]) * (1 - progress) / gained if gained > 0 else float("nan")
        numbers = (
            f"step {record['step']:,}  {_losses(record)}  {record['tokens_per_second']:,.0f} tok/s  "
            f"waiting {record['waiting_share']:.1%}  {_clock(left)} left"
        )
        self._bar.update(self._task, completed=progress, numbers=numbers)
        if not self.is_terminal and (elapsed - self._last_line > SECONDS_BETWEEN_LINES or progress >= 1):
            self._last_line = elapsed
            print(f"{self.label} {progress:4.0%}  {numbers}", file=sys.stderr, flush=True)


def _losses(record: Record) -> str:
    """`loss 2.0413 (1 loop 2.50, 4 2.01, 8 1.98)`: the fewest loops, the middle, the most."""
    by_loops = {int(name.removeprefix(BY_LOOPS)): value for name, value in record.items() if name.startswith(BY_LOOPS)}
    counts = sorted(by_loops)
    shown = sorted({counts[0], counts[len(counts) // 2], counts[-1]}) if counts else []
    parts = ", ".join(f"{n}{_word(n) if n == shown[0] else ''} {by_loops[n]:.3f}" for n in shown)
    return f"loss {record['loss_mean']:.4f}{f' ({parts})' if parts else ''}"


def _word(n_loops: int) -> str:
    return " loop" if n_loops == 1 else " loops"


class CountProgress:
    """A bar over a known number of things in a terminal, a line now and then elsewhere; all of it on stderr."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.is_terminal = sys.stderr.isatty()
        self._n_done = 0.0
        self._last_line = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> "CountProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, n_more: float) -> None:
        self._n_done += n_more
        self._bar.advance(self._task, n_more)
        now = time.perf_counter()
        if not self.is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self.label} {self._n_done:,.0f} of {self.total:,}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return "--:--" if seconds != seconds else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
