"""What a command imports before it does its work: start-up is mostly imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeeds

# Runs command lines one after another in one process, and prints which of the modules named first are loaded then,
# beyond those of `import torch` if that comes first.
RUN_ALL = """
import contextlib, io, json, sys
sys.stdin = io.StringIO()
asked = json.load(open(sys.argv[1]))
if asked["with_torch"]:
    import torch
before = set(sys.modules)
from looplm.cli.main import main
class Said(io.StringIO):
    at_first = None
    def write(self, text):
        if self.at_first is None:
            self.at_first = set(sys.modules)
        return super().write(text)
found = []
for words in asked["commands"]:
    sys.argv = ["looplm", *words]
    said = Said()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as error:
        status = error.code or 0
    now = said.at_first if asked["until_it_prints"] else sys.modules
    loaded = [name for name in asked["names"] if name in now and name not in before]
    found.append([" ".join(words), status, loaded, said.getvalue()[-500:]])
print(json.dumps(found))
"""
HEAVY = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "matplotlib",
    "transformers",
)


def check(
    tmp_path: Path, *commands: str, names: tuple[str, ...], with_torch: bool, until_it_prints: bool = False
) -> None:
    """None of `names` is loaded after any of the commands, or when it prints first."""
    asked = {"commands": [words.split() for words in commands], "names": names, "with_torch": with_torch}
    asked["until_it_prints"] = until_it_prints
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(asked))
    command = [sys.executable, "-c", RUN_ALL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words, status, loaded, said in json.loads(done.stdout):
        assert status == 0, (words, said)
        assert not loaded, words


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What `watch` reads of a run."""
    records = [{"step": step, "loss": 3.0 - step, "progress": 0.5} for step in (1, 2)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "run"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    text, tokenizer, folder = tmp_path / "text.md", tmp_path / "tokenizer", tmp_path / "prepared"
    text.write_text("A line of text that is here to be read.\n" * 100)
    succeeds("tokenizer", "train", text, "--vocab", "280", "--out", tokenizer)
    succeeds("data", "prepare", text, "--tokenizer", tokenizer, "--held-out", "0", "--out", folder)
    return folder


def test_looking_takes_no_torch(tmp_path: Path, run: Path, prepared: Path) -> None:
    commands = ["--version", "--help", "train --help", "data prepare --help", "config", f"watch {run} --once"]
    check(tmp_path, *commands, names=("torch", "numpy", *HEAVY), with_torch=False)
    check(tmp_path, f"data prepare --inspect --out {prepared}", names=("torch", *HEAVY), with_torch=False)


GENERATE = "generate builtin:reasoner --max-new-tokens 2 --prompt 1"
EVAL = "eval builtin:reasoner --n 1 --no-harder"


def test_no_command_loads_what_it_needs_not(tmp_path: Path) -> None:
    check(tmp_path, "count looplm-text-1m", "config reason", GENERATE, "chat", EVAL, names=HEAVY, with_torch=True)


def test_plan_prints_what_a_run_does_before_it_measures_memory(tmp_path: Path) -> None:
    check(tmp_path, "plan text data.path=x --gpus 1", names=HEAVY, with_torch=True, until_it_prints=True)


@pytest.mark.long
def test_no_help_takes_torch(tmp_path: Path) -> None:
    from typer.main import get_command

    from looplm.cli.app import app

    commands = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        commands += [f"{name} --help", *(f"{name} {verb} --help" for verb in getattr(command, "commands", ()))]
    check(tmp_path, *commands, names=("torch", "numpy", *HEAVY), with_torch=False)


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        "count mythos-1t --json",
        "config pretrain",
        GENERATE,
        "chat",
        EVAL,
    ],
)
def test_a_command_by_itself_loads_what_it_needs(command: str, tmp_path: Path) -> None:
    check(tmp_path, command, names=HEAVY, with_torch=True)
