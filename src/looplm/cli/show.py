"""Tables in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from looplm.cli.tables import print_table
from looplm.eval.exits import Trial
from looplm.eval.interval import Score
from looplm.eval.loops import Dial
from looplm.eval.staircase import Row


def percent(score: Score) -> str:
    """`99.4 [98.3, 99.8]` in percent."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def reasoning_table(title: str, columns: Mapping[str, Mapping[str, Score | str]]) -> None:
    """Tasks down, models or loop counts across."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right")
    tasks = list(dict.fromkeys(task for scores in columns.values() for task in scores))
    for task in tasks:
        cells = [scores.get(task, "-") for scores in columns.values()]
        table.add_row(escape(task), *(percent(cell) if isinstance(cell, Score) else cell for cell in cells))
    print_table(table)


def dial_table(dial: Dial) -> None:
    """Loops down; quality, loss, and what the state did at that loop."""
    table = Table(title=escape(f"quality by number of loops ({dial.what})"), title_justify="left")
    for name in ("loops", "right, % [95 %]", "loss, nats", "change", "state rms"):
        table.add_column(name, justify="right")
    states = {state.loop: state for state in dial.states}
    for row in dial.rows:
        state = states.get(row.loops)
        change = "-" if state is None or state.change is None else f"{state.change:.4f}"
        size = "-" if state is None else f"{state.norm:.2f}"
        mark = " *" if row.loops == dial.trained else ""
        table.add_row(f"{row.loops}{mark}", percent(row.score), f"{row.loss:.4f}", change, size)
    print_table(table)
    Console().print(f"[dim]* trained depth[/dim]\n{escape(dial.verdict)}")


def trials_table(trials: Sequence[Trial], chosen: Trial, *, confidence: float) -> None:
    """Exit rules down, strictest first, the chosen one marked, each with the sequences it broke and their bound."""
    first = trials[0]
    title = f"full depth: {first.full_loops:.1f} loops a token, {percent(first.full)} % of sequences right"
    table = Table(title=escape(title), title_justify="left")
    for name in ("rule", "mean loops", "fewer, %", "right, %", "broken", "bound, %"):
        table.add_column(name, justify="right")
    for trial in trials:
        mark = " *" if trial is chosen else ""
        table.add_row(
            f"{trial.rule}{mark}",
            f"{trial.mean_loops:.1f}",
            f"{100 * trial.saved:.1f}",
            f"{100 * trial.exact.accuracy:.1f}",
            str(trial.n_broken),
            f"{100 * trial.bound(confidence):.2f}",
        )
    print_table(table)
    Console().print("[dim]* chosen; broken: right at full depth and wrong with the rule[/dim]")


def _exact(row: Row) -> str:
    loops = "" if row.mean_loops is None else f" ({row.mean_loops:.1f})"
    return f"{100 * row.exact.accuracy:.1f}{loops}"


def staircase_table(title: str, models: Mapping[str, Sequence[Row]]) -> None:
    """Loops down, lengths across, a block per model; percent of sequences with every position right."""
    lengths = list(dict.fromkeys(row.length for rows in models.values() for row in rows))
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("loops")
    for length in lengths:
        table.add_column(f"n={length}", justify="right")
    for name, rows in models.items():
        for rule in dict.fromkeys(row.rule for row in rows):
            cells = {row.length: _exact(row) for row in rows if row.rule == rule}
            table.add_row(name, rule, *(cells.get(length, "-") for length in lengths))
        table.add_section()
    print_table(table)
    n = next(iter(models.values()))[0].exact.n
    Console().print(
        f"[dim]{n} fresh sequences a cell; 95 % interval at 100 %: [{100 * Score(n, n).interval[0]:.1f}, 100][/dim]"
    )
