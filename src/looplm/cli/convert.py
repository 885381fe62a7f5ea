"""`looplm import` and `looplm export`: other systems' checkpoints."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from looplm.cli.arguments import count_option

SYSTEM = typer.Argument(metavar="{nanochat,openmythos,osrt}", help="The system that wrote the checkpoint.")


def import_(
    system: Annotated[str, SYSTEM],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint file, or the folder that holds it.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    config: Annotated[
        Path | None,
        typer.Option(help="JSON of the original's config fields, where the file lacks them.", show_default=False),
    ] = None,
) -> None:
    """Make a run folder of another system's checkpoint: for count, export and looplm.load.

    Examples:

        looplm import nanochat model_000700.pt --out runs/nano
        looplm import osrt checkpoint.pt --config config.json --out runs/osrt
    """
    from looplm.hf.convert import table_of
    from looplm.hf.files import import_run
    from looplm.reading import read_json

    table_of(system)
    fields = read_json(config, what="--config") if config is not None else {}
    model = import_run(system, checkpoint, out=out, config=fields, say=partial(typer.echo, err=True))
    size = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{out}: {size:,} parameters of {system}, {model.config.n_loops} loops")


def average(
    run: Annotated[Path, typer.Argument(help="A run folder with several checkpoints (train.keep=5).")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    last: Annotated[int, count_option("--last", help="How many of the newest checkpoints.")] = 2,
) -> None:
    """Average the weights of a run's last checkpoints: often better than the last one, without more training.

    Examples:

        looplm average runs/r --last 5 --out runs/r-mean
    """
    from looplm.train.average import average_checkpoints

    taken = average_checkpoints(run, out, n=last)
    typer.echo(f"{out}: the mean of {', '.join(path.name for path in taken)}")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that `looplm import` made.")],
    to: Annotated[str, typer.Option(metavar="{nanochat,openmythos,osrt}", help="The system to write for.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
) -> None:
    """Write an imported run back in the original's format.

    Examples:

        looplm export runs/nano --to nanochat --out nano-again
    """
    from looplm.checkpoint import load
    from looplm.hf.convert import table_of
    from looplm.hf.files import export_run

    table_of(to)
    typer.echo(f"wrote {export_run(load(run), run, system=to, out=out)}")
