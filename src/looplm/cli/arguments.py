"""What several commands read from the command line."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any

import typer

from looplm.errors import ConfigError

# Seeds and counts end here: larger ones fit no 64-bit integer, which is what torch and safetensors keep.
LARGEST = 2**63 - 1
CALIBRATED = "calibrated"  # what --exit calls the rule that is stored in the run
WHOLE_NUMBER = re.compile(r"[+-]?\d+(_\d+)*(\.\d+)?(e\+?\d{1,3})?", re.ASCII | re.IGNORECASE)

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
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
DType = Annotated[str, typer.Option(help="Type of the weights, fp32 or bf16: half the memory, a little less exact.")]
JsonSwitch = Annotated[
    bool, typer.Option("--json", help="A switch: print JSON instead of text. For a file: --json > FILE.")
]


def refuse_file_for_json(extra: Sequence[str], *, json_out: bool) -> None:
    """Refuse words that no argument takes, most likely a file for --json, which is a path in other commands."""
    if extra and json_out:
        raise ConfigError(f"--json is a switch here and takes no file: write --json > {extra[0]}")
    if extra:
        raise ConfigError(f"unexpected argument {extra[0]!r}; a text with spaces needs quotes")


def count_option(
    option: str, *, help: str, least: int = 1, most: int = LARGEST, show_default: bool | str = True
) -> Any:
    """A typer option that takes one whole number from `least` to `most`, written as `whole_number` reads it."""

    def parse(text: str | int) -> int:  # typer passes the default through it too
        return whole_number(str(text), option=option, least=least, most=most)

    return typer.Option(option, help=help, parser=parse, metavar="N", show_default=show_default)


def whole_number(text: str, *, option: str, least: int = 1, most: int = LARGEST) -> int:
    """`5000`, `5_000` or `5e3` as a whole number.

    Raises:
        ConfigError: it is no whole number, or not between `least` and `most`.
    """
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    value = _decimal(text)
    if value is None:
        raise ConfigError(f"{option} {shown!r} is not a whole number; write it as 5000, 5_000 or 5e3")
    if value < least:
        raise ConfigError(f"{option} {shown} is too small; give {least} or more")
    if value > most:
        raise ConfigError(f"{option} {shown} is too large; give at most {most:,}")
    return int(value)


def _decimal(text: str) -> Decimal | None:
    """The value of a whole number, which may be far too large to be an int; None if it is no whole number."""
    if not WHOLE_NUMBER.fullmatch(text.strip()):
        return None
    value = Decimal(text)
    return value if value == value.to_integral_value() else None


def fields(names: list[str] | None) -> str | None:
    """--field, once or several times, as `looplm.data.records` reads it."""
    return ",".join(names) if names else None


def numbers(text: str, *, option: str) -> list[int]:
    """`12,24,64` as whole numbers of at least 1."""
    parts = text.split(",")
    if any(_decimal(part) is None for part in parts):
        raise ConfigError(f"{option} {text!r} is not a list of whole numbers such as 1,2,4")
    return [whole_number(part, option=option) for part in parts]


def loop_counts(text: str) -> list[int]:
    """`1,2,4,8` as numbers of loops."""
    return numbers(text, option="--loops")


def early_exit(rule: str, *, run: str, missing: str | None) -> Any:
    """What --exit and --missing say, an `EarlyExit`."""
    from looplm.checkpoint import run_folder
    from looplm.config import did_you_mean
    from looplm.eval.exits import load_exit
    from looplm.infer.decoders import EarlyExit
    from looplm.infer.exits import KINDS

    if rule.strip() != CALIBRATED and did_you_mean(rule, (*KINDS, CALIBRATED)).endswith(f"{CALIBRATED!r}?"):
        raise ConfigError(f"no exit rule {rule!r}; did you mean {CALIBRATED!r}?")
    if rule.strip() != CALIBRATED:
        return EarlyExit.parse(rule, missing=missing)
    if missing is not None:
        raise ConfigError("--missing is part of the calibrated rule; leave it out, or name a rule")
    return load_exit(run_folder(run))
