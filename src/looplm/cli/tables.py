"""Tables whose numbers are whole, however narrow the terminal is."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def print_table(table: "Table") -> None:
    """Print a table of strings. Where it is too wide its cells are broken between words, and where that is not enough
    it is turned: a value a line. Rich alone would cut words, and numbers with them."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    console = Console()
    columns = [[Text.from_markup(str(cell)) for cell in (column.header, *column.cells)] for column in table.columns]
    widest = [max(max(map(len, text.plain.split("\n"))) for text in column) for column in columns]
    unbounded = console.options.update(max_width=1 << 20)
    frame = Measurement.get(console, unbounded, table).maximum - sum(widest)
    narrowest = [max(max(map(len, text.plain.split()), default=0) for text in column) for column in columns]
    spare = console.width - frame - sum(narrowest)
    if spare < 0:
        _print_turned(table, columns, console)
        return
    wanted = [most - least for most, least in zip(widest, narrowest, strict=True)]
    share = min(1.0, spare / max(1, sum(wanted)))
    for column, least, more in zip(table.columns, narrowest, wanted, strict=True):
        column.width = least + int(share * more)
    console.print(table)


def _print_turned(table: "Table", columns: list[list["Text"]], console: "Console") -> None:
    """A block a row: its first value, then a line for each of the others."""
    headers = [column[0].plain.replace("\n", " ") for column in columns]
    if table.title is not None:
        console.print(table.title, style="italic")
    for row in list(zip(*columns, strict=True))[1:]:
        for number, (header, cell) in enumerate(zip(headers, row, strict=True)):
            # wrapped by the terminal, if at all
            console.print(
                f"{'  ' if number else ''}{header} {cell.plain}", soft_wrap=True, markup=False, highlight=False
            )
