"""All commands. Only typer is imported here: everything else waits until a command needs it, so help is fast."""

from typing import Annotated

import typer

from looplm import __version__
from looplm.cli import compare, convert, data, evaluate, inspect, plan, talk, tokenizer, train, watch

MORE_WORDS = {"allow_extra_args": True}  # for commands that say themselves what is wrong with them
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
app.command("generate", context_settings=MORE_WORDS)(talk.generate)
app.command("count", context_settings=MORE_WORDS)(inspect.count)
app.command("config")(inspect.config)
app.command("plan")(plan.plan)
app.command("import")(convert.import_)
app.command("export")(convert.export)
app.command("average")(convert.average)
app.command("demo")(evaluate.demo)
app.add_typer(data.app, name="data")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"looplm {__version__}")
        raise typer.Exit


@app.callback()
def _looplm(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Small language models that think in loops: train, measure and talk to them."""
