"""Text is UTF-8 in any locale: no call leaves the encoding to it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT_METHODS = {"read_text": 0, "write_text": 1}  # of Path, and where the encoding stands if it is not named
PIPED = {"run", "Popen", "check_output", "check_call", "call"}  # of subprocess


def without_encoding(path: Path) -> Iterator[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg for keyword in node.keywords}
        if "encoding" in named:
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in TEXT_METHODS and is_method and len(node.args) <= TEXT_METHODS[name]:
            yield node.lineno
        elif name in ("open", "fdopen") and not (is_method and ast.unparse(node.func) == "os.open"):
            modes = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            if not any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes):
                yield node.lineno
        elif name in PIPED and {"text", "universal_newlines"} & named:
            yield node.lineno


@pytest.mark.parametrize("folder", ["src", "benchmarks", "recipes"])
def test_every_text_file_and_pipe_names_its_encoding(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in (ROOT / folder).rglob("*.py") for line in without_encoding(path)
    ]
    assert not found, found


def test_the_reader_of_calls_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "calls.py"
    path.write_text(
        "Path('a').read_text()\nPath('a').write_text('b')\nopen('a')\nPath('a').open('w')\n"
        "subprocess.run([], text=True)\nPath('a').open('rb')\nPath('a').read_text(encoding='utf-8')\nread_text(a)\n",
        encoding="utf-8",
    )
    assert list(without_encoding(path)) == [1, 2, 3, 4, 5]


def test_configs_are_read_and_written_alike_in_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: {d_model: 64}\n# é 😀\nname: "é 😀"\n', encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from looplm.reading import read_yaml, dump_yaml\n"
        "from looplm.files import write_whole\n"
        "path = Path(sys.argv[1]); found = read_yaml(path); write_whole(path, dump_yaml(found).encode())\n"
        "assert read_yaml(path) == found; assert found['name'] == '\\xe9 \\U0001f600', ascii(found)\n"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
