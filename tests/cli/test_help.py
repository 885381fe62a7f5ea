"""Help of every command."""

import shlex

import pytest
import typer

from commands import succeeds
from looplm.cli.app import app


def leaves(group: object, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every command by its words."""
    found: dict[tuple[str, ...], object] = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        is_group = hasattr(command, "commands")
        found |= leaves(command, (*words, name)) if is_group else {(*words, name): command}
    return found


COMMANDS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_examples_that_fit_80_columns(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in succeeds(*words, "--help").splitlines()]
    examples = lines[lines.index("Examples:") + 2 :]
    examples = examples[: examples.index("")]
    assert examples
    for example in examples:
        program, *asked = shlex.split(example)
        assert program == "looplm"
        path = next(path for path in COMMANDS if tuple(asked[: len(path)]) == path)
        mine = {option for each in COMMANDS[path].params for option in each.opts}  # type: ignore[attr-defined]
        options = [word for word in asked if word.startswith("--")]
        assert set(options) <= mine, example
    assert any(example.startswith(f"looplm {' '.join(words)}") for example in examples)
