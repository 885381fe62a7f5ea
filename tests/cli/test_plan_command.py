"""`looplm plan` as a user meets it, and the tables of docs/scale.md. Run as a script, it writes them anew."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from looplm.cli.app import app
from looplm.errors import ConfigError

SMALL = ("plan", "pretrain", "data.row_len=64", "--gpus", "1,4", "--tokens", "1e9")


PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
TABLE = re.compile(r"^```text\n\$ looplm (plan .*)\n((?:.*\n)*?)```$", re.MULTILINE)


def looplm(*words: str) -> str:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    if done.exception is not None:
        raise done.exception
    return done.stdout


def plan(*words: str) -> str:
    return looplm(*SMALL, *words)


def printed(command: str) -> str:
    """What a command prints, without empty lines and what stands at the end of lines."""
    lines = (line.rstrip() for line in looplm(*shlex.split(command)).splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def test_plan_prints_what_json_holds() -> None:
    out, found = plan("--price", "2"), json.loads(plan("--price", "2", "--json"))
    assert f"{found['parameters']:,}" in out
    assert "1e+09 (as given)" in out
    assert f"{found['flops']:.3g} in all" in out
    assert [on["n_gpus"] for on in found["on"]] == [1, 4]
    four = found["on"][1]
    row = next(line for line in out.splitlines() if line.strip().startswith("4 FSDP"))
    names = "weights gradients optimizer gathered activations loss".split()
    sizes = [four["fsdp"][name] for name in names]
    assert re.findall(r"\d+\.\d+", row) == [f"{size / 1e9:.2f}" for size in (*sizes, sum(sizes))]
    assert row.strip().endswith("yes")
    assert "2 dollars per GPU and hour;" in out
    assert "4 GPUs need train.accumulate to be a multiple" in out


def test_assumed_prices_are_said_to_be() -> None:
    out = plan("--gpu", "l4", "--mfu", "0.3", "train.accumulate=4")
    assert "At 30% of 121 TFLOP/s and 0.8 dollars per GPU and hour (assumed)" in out
    assert "accumulate to be" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "h10"), "no GPU named 'h10'; did you mean 'h100'"),
        (("--gpus", "1;2"), "--gpus '1;2' is not a list of whole numbers"),
        (("--gpus", "0"), "--gpus 0 is too small"),
        (("--mfu", "40"), "--mfu 40 is no share"),
        (("--model", "mythos-10"), "no model preset named 'mythos-10'"),
    ],
)
def test_mistakes_end_in_a_line_that_says_what_to_do(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(*words)


COMMANDS = [found[1] for found in TABLE.finditer(PAGE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "command", [COMMANDS[0], *(pytest.param(command, marks=pytest.mark.long) for command in COMMANDS[1:])]
)
def test_the_page_shows_what_the_command_prints(command: str) -> None:
    (table,) = (found[2] for found in TABLE.finditer(PAGE.read_text(encoding="utf-8")) if found[1] == command)
    assert printed(command) == table


def test_the_page_has_its_tables() -> None:
    assert len(TABLE.findall(PAGE.read_text(encoding="utf-8"))) == 5


if __name__ == "__main__":
    text = TABLE.sub(lambda found: f"```text\n$ looplm {found[1]}\n{printed(found[1])}```", PAGE.read_text("utf-8"))
    PAGE.write_text(text, encoding="utf-8")
