"""`looplm watch` and `looplm report`: a run while it trains, and afterwards."""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*%#"  # for terminals and files that have no other characters
NARROW = 80  # columns below which a curve and its numbers stand on separate lines
SHOWN = {  # the numbers shown of the newest record, and their format
    "loss": "{:.4f}",
    "val_bpb": "{:.4f} bits per byte, held out",
    "val_loss": "{:.4f} held out",
    "n_loops": "{:.2f} a token",
    "lr_scale": "{:.3f} of the peak rate",
    "grad_norm": "{:.3f}",
    "max_load": "{:.2f} times an even load, the busiest expert",
    "tokens": "{:,.0f}",
    "tokens_per_second": "{:,.0f}",
    "tflops": "{:.3f}",
    "mfu": "{:.1%} of what its matrix products reach, measured at the start",
    "phase": "{:.0f}",
    "memory_gb": "{:.2f}",
    "waiting_share": "{:.1%} of the time, for data",
}
MOST_SECONDS = 1e6
CURVES = ("loss", "val_bpb", "val_loss", "tokens_per_second")

RunArgument = Annotated[Path, typer.Argument(help="A run folder of `looplm train`.")]


def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print once and end; so it is without a terminal.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 1.0,
) -> None:
    """Watch a run in the terminal: curves, newest numbers, the newest sample. Ctrl-C ends it; the run continues.

    Examples:

        looplm watch runs/r
        looplm watch runs/r --once
    """
    from rich.console import Console
    from rich.live import Live

    from looplm.errors import ConfigError

    if not 0 < every < MOST_SECONDS:
        raise ConfigError(f"--every {every:g} has to be more than 0 and less than {MOST_SECONDS:g} seconds")
    console = Console()
    bars = ASCII_BARS if console.options.ascii_only else BARS
    if once or not console.is_terminal:
        console.print(_view(run, width=console.width, bars=bars))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_view(run, width=console.width, bars=bars), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        pass


def _view(run: Path, *, width: int, bars: str) -> "Group":
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from looplm.telemetry.history import read_history, series
    from looplm.telemetry.sinks import METRICS, SAMPLES

    records = read_history(run)
    if not records:
        return Group(Text(f"{run}: no step is logged yet"))
    newest = records[-1]
    age = time.time() - (run / METRICS).stat().st_mtime
    progress = float(newest.get("progress", 0))
    state = "done" if progress >= 1 else f"last heard of {age:.0f} s ago"
    title = Text(f"{run}  step {newest['step']:,}  {_clock(float(newest.get('seconds', 0)))}  {state}", style="bold")
    curves = Table.grid(padding=(0, 2))
    for name in CURVES:
        found = [pair for pair in zip(*series(records, name), strict=True) if math.isfinite(pair[1])]
        values = [value for _, value in found]
        if len(values) > 1:
            room = width if width < NARROW else width - 60
            curve = sparkline(values, width=max(10, min(60, room)), bars=bars)
            told = f"{values[0]:,.4g} at step {found[0][0]:,.0f}, now {values[-1]:,.4g}"
            if width < NARROW:
                curves.add_row(f"{name}  {told}")
                curves.add_row(curve)
            else:
                curves.add_row(name, curve, told)
    numbers = Table.grid(padding=(0, 2))
    for name, form in SHOWN.items():
        newest_of = series(records, name)[1][-1:]
        if newest_of:
            told = form.format(*newest_of)
            numbers.add_row(*([f"{name}  {told}"] if width < NARROW else [name, told]))
    bar = Table.grid()
    bar.add_row(ProgressBar(total=1.0, completed=progress, width=min(60, width - len(" 100%"))), f" {progress:.0%}")
    sample = Text("", end="")
    if (run / SAMPLES).is_file():
        lines = (run / SAMPLES).read_text(encoding="utf-8", errors="replace").splitlines()
        sample = Text(f"newest sample: {lines[-1] if lines else '-'}", style="dim")
    return Group(title, bar, curves, numbers, sample)


def sparkline(values: list[float], *, width: int, bars: str = BARS) -> str:
    """A curve of one line: the mean of each of `width` stretches, from the lowest bar to the highest."""
    width = min(width, len(values))
    edges = [round(number * len(values) / width) for number in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="HTML file.", show_default="RUN/report.html")] = None,
) -> None:
    """Write one HTML file about a run: curves, its newest numbers, samples, config.

    Examples:

        looplm report runs/r
        looplm report runs/r --out r.html
    """
    import importlib.util

    from looplm.checkpoint import CONFIG, run_folder
    from looplm.cli.outputs import check_ending, check_writable, write_file
    from looplm.errors import ConfigError
    from looplm.eval.plots import history_plot
    from looplm.eval.report import Report
    from looplm.telemetry.history import read_history, series
    from looplm.telemetry.sinks import SAMPLES

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("report draws with matplotlib, which is not installed: pip install 'looplm[plot]'")
    folder = run_folder(run)
    path = out or folder / "report.html"
    check_ending(path, (".html", ".htm"), option="--out")
    check_writable(path, option="--out")
    records = read_history(folder)
    if not records:
        raise ConfigError(f"{str(run)!r} has logged no step yet; there is nothing to report")
    page = Report(f"{run}")
    newest = records[-1]
    page.paragraph(
        f"Step {newest['step']:,}, {newest.get('tokens', 0):,} tokens, {_clock(float(newest.get('seconds', 0)))}.",
        dim=True,
    )
    page.image(history_plot(records), alt="curves over steps")
    page.heading("Newest numbers")
    told = [(name, series(records, name), form) for name, form in SHOWN.items()]
    rows = [[name, f"{found[0][-1]:,.0f}", form.format(found[1][-1])] for name, found, form in told if found[1]]
    page.table(["", "step", ""], rows)
    if (folder / SAMPLES).is_file():
        page.heading("Samples")
        for line in (folder / SAMPLES).read_text(encoding="utf-8", errors="replace").splitlines()[-5:]:
            page.code(line)
    page.heading("Config")
    page.code((folder / CONFIG).read_text(encoding="utf-8"))
    write_file(path, page.html().encode(), option="--out")
