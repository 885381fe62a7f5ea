"""What several commands read from the command line."""

from typing import Annotated, Any

import typer

from looplm.errors import ConfigError

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCES...",
        help="Files of text, folders or globs (.jsonl, .json and .parquet hold records; .gz .xz .bz2 .zst are read "
        "too), hub:NAME[,CONFIG,SPLIT], or builtin:python.",
        show_default=False,
    ),
]
Field = Annotated[
    list[str] | None,
    typer.Option(
        help="Field of records that holds the text; repeat the option, or write question,answer, for several.",
        show_default="the first of text, content, ...",
    ),
]


def fields(names: list[str] | None) -> str | None:
    """--field, once or several times, as `looplm.data.records` reads it."""
    return ",".join(names) if names else None


def numbers(text: str, *, option: str) -> list[int]:
    """`12,24,64` as whole numbers of at least 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of whole numbers such as 1,2,4") from None
    for value in values:
        if value < 1:
            raise ConfigError(f"{option} {value} is too small; give 1 or more")
    return values


def loop_counts(text: str) -> list[int]:
    """`1,2,4,8` as numbers of loops."""
    return numbers(text, option="--loops")


def early_exit(rule: str, *, run: str, missing: str | None) -> Any:
    """What --exit and --missing say, an `EarlyExit`."""
    from looplm.checkpoint import run_folder
    from looplm.eval.exits import load_exit
    from looplm.infer.decoders import EarlyExit

    if rule.strip() != "calibrated":
        return EarlyExit.parse(rule, missing=missing)
    if missing is not None:
        raise ConfigError("--missing is part of the calibrated rule; leave it out, or name a rule")
    return load_exit(run_folder(run))
