"""Lists on the command line."""

from looplm.errors import ConfigError


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
