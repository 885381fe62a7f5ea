"""The documentation's commands run, and its links and names exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeeds

ROOT = Path(__file__).parents[1]
LONG = ("--compile", "--suite loops")  # of commands that take their time
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command of a page, in order: a later one may read what an earlier one wrote."""
    return [line for block in blocks(page, "sh") for line in block.strip().splitlines()]


def run(command: str) -> None:
    """In this process if it is `looplm` alone, else in a shell."""
    words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
    if words[0] == "looplm" and not set("|<>&;()") & {word[0] for word in words if word}:
        succeeds(*shlex.split(command)[1:])
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if not any(mark in command for mark in LONG):
            run(command)


@pytest.mark.long
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(mark in str(commands(page)) for mark in LONG)], ids=lambda page: page.name
)
def test_long_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if any(mark in command for mark in LONG):
            run(command)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page build on each other, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_commands_are_found_at_all() -> None:
    assert sum(len(blocks(page, "sh")) for page in PAGES) >= 4


def test_every_dependency_has_its_line() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    for requirement in wanted:
        assert re.split(r"[<>=]", requirement)[0] in text, requirement
