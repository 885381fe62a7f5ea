"""The `looplm` command. Only typer is imported here: everything else waits until a verb needs it, so help is fast."""

import os
import sys
from typing import NoReturn

import typer

from looplm.cli import compare, convert, data, evaluate, inspect, plan, talk, tokenizer, train, watch
from looplm.errors import LooplmError

app = typer.Typer(
    name="looplm",
    help="Small language models that think in loops: train, measure and talk to them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.add_typer(tokenizer.app, name="tokenizer")
app.command("watch")(watch.watch)
app.command("report")(watch.report)
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(evaluate.calibrate)
app.command("compare")(compare.compare)
app.command("chat")(talk.chat)
app.command("generate")(talk.generate)
app.command("count")(inspect.count)
app.command("config")(inspect.config)
app.command("plan")(plan.plan)
app.command("import")(convert.import_)
app.command("export")(convert.export)
app.command("average")(convert.average)
app.command("demo")(evaluate.demo)
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line, not a traceback."""
    # torch asks for huge pages when it allocates large tensors: fresh memory is dear where pages are small
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except LooplmError as error:
        _fail(str(error))
    except OSError as error:  # a disk that filled up, a folder that vanished: nothing of ours can mend it
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    """Say it, once where torchrun has started many of us on this machine, and end."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(message, err=True)
    sys.exit(1)
