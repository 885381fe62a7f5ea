"""`looplm generate` with prompts from the command line, a file and standard input."""

import json
from pathlib import Path

import pytest

from bare_runs import bare_run, tiny
from commands import fails, succeeds

SUM, PARITY = "What is 47 + 85?", "Is 7 even or odd?"
ASK = ("generate", "builtin:reasoner")


def test_standard_input_holds_a_prompt_a_line(tmp_path: Path) -> None:
    text = f"\ufeff{SUM}\r\n\r\n   \n{PARITY}\r\n".encode()
    records = [json.loads(line) for line in succeeds(*ASK, "--prompt", "-", "--json", text=text).splitlines()]
    assert [(record["prompt"], record["answer"]) for record in records] == [(SUM, "132"), (PARITY, "odd")]
    assert succeeds(*ASK, "--prompt", "-", text=f"{SUM}\n{PARITY}").splitlines()[-1] == "odd"


def test_prompts_of_a_file_and_of_the_command_line_go_together(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PARITY}\n")
    words = ("--prompt", SUM, "--prompt", "-", "--prompts", path, "--json", "--batch-size", "2")
    records = [json.loads(line) for line in succeeds(*ASK, *words, text="What is 1 + 1?\n").splitlines()]
    assert [record["answer"] for record in records] == ["132", "2", "odd"]
    assert "\n".join(record["prompt"] for record in records) == f"{SUM}\nWhat is 1 + 1?\n{PARITY}"


def test_texts_are_continued_line_by_line(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", tiny(), data={"kind": "bytes", "path": "text.txt"})
    words = ("--prompt", "-", "--json", "--max-new-tokens", "3")
    records = [json.loads(line) for line in succeeds("generate", run, *words, text=" The\n\nA \n").splitlines()]
    assert [record["prompt"] for record in records] == [" The", "A "]
    assert [record["n_tokens"] for record in records] == [3, 3]


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        (["--prompt", "-"], b"", "standard input holds no prompt; give one a line"),
        (["--prompt", "-"], b"\xef\xbb\xbf\r\n \n", "standard input holds no prompt"),
        (["--prompt", "-"], b"1 + 1\ncaf\xe9\n", "standard input, line 2: byte 4 (0xe9) is not UTF-8"),
        (["--prompt", "-", "--prompt", "-"], b"1", "standard input can be read once"),
        (["--prompt", "-", "--prompts", "-"], b"1", "standard input can be read once"),
        (["--prompts", "{tmp}"], b"", "is a folder"),
        (["--prompts", "{tmp}/none"], b"", "does not exist"),
        (["--prompts", "/dev/zero"], b"", "is a device or a pipe"),
        ([], b"", "no prompt given; add --prompt TEXT"),
        (["--prompt", SUM, "--json", "out.json"], b"", "--json is a switch here and takes no file: write --json > out"),
        (["--prompt", "two", "words"], b"", "unexpected argument 'words'"),
    ],
)
def test_prompts_that_are_not_there_are_one_line(words: list[str], text: bytes, says: str, tmp_path: Path) -> None:
    assert says in fails(*ASK, *(word.format(tmp=tmp_path) for word in words), text=text)
