"""Start-up: CPU seconds of every command, beside those of `import torch`.

python benchmarks/startup.py [--times 5] [--only generate eval] [--json out.json]

A command that loads a model ends when its weights are loaded, `plan` when it prints first (its memory is measured
later), and every other one by itself. Each is run `--times`
times as a process, and the least of its user and system seconds counts: other work on the machine only ever adds some.
The bound is 0.6 s for a command without torch, and 0.7 s above `import torch` for one with it. A number above its
bound is marked, and fails nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIGHT, ABOVE_TORCH = 0.6, 0.7  # seconds
# Ends the process as soon as the weights of a model are loaded.
UNTIL_LOADED = """
import os, sys
from looplm import checkpoint
from looplm.cli.main import main
load = checkpoint.load_weights
def load_and_end(*arguments, **options):
    load(*arguments, **options)
    os._exit(0)
checkpoint.load_weights = load_and_end
main()
"""
# Ends it as soon as something is printed.
UNTIL_PRINTED = """
import io, os, sys
from looplm.cli.main import main
class End(io.StringIO):
    def write(self, text):
        os._exit(0)
sys.stdout = End()
main()
"""
# words of the command: whether it takes torch (None for one without a bound), and what ends it early
COMMANDS: dict[str, tuple[bool | None, str | None]] = {
    "--version": (False, None),
    "--help": (False, None),
    "train --help": (False, None),
    "eval --help": (False, None),
    "data prepare --help": (False, None),
    "config": (False, None),
    "data prepare --inspect --out PREPARED": (False, None),
    "watch RUN --once": (False, None),
    "generate builtin:reasoner --prompt 1+1": (True, UNTIL_LOADED),
    "chat": (True, UNTIL_LOADED),
    "eval builtin:reasoner": (True, UNTIL_LOADED),
    "count looplm-text-1m": (True, None),
    "count builtin:reasoner": (True, None),
    "plan pretrain": (True, UNTIL_PRINTED),
    "config reason": (True, None),
    "train s3 --steps 1 --out NEW train.n_workers=0": (None, None),
}


def cpu_seconds(command: list[str], *, times: int) -> float:
    """Least user and system seconds of a process, over `times` runs."""
    seconds = []
    for number in range(times):
        words = [f"{word}-{number}" if word.endswith("/new") else word for word in command]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {said}")
        seconds.append(usage.ru_utime + usage.ru_stime)
    return min(seconds)


def make_inputs(folder: Path) -> dict[str, str]:
    """A prepared text and a run, by the words that stand for them above."""
    text, places = folder / "text.md", {"PREPARED": "prepared", "RUN": "run", "NEW": "new"}
    text.write_text("A line of text that is here to be read.\n" * 2000, encoding="utf-8")
    paths = {word: str(folder / name) for word, name in places.items()}
    tokenizer = str(folder / "tokenizer")
    for words in (
        ["tokenizer", "train", str(text), "--vocab", "280", "--out", tokenizer],
        ["data", "prepare", str(text), "--tokenizer", tokenizer, "--held-out", "0", "--out", paths["PREPARED"]],
        ["train", "s3", "--steps", "2", "--out", paths["RUN"], "train.n_workers=0"],
    ):
        subprocess.run([sys.executable, "-m", "looplm", *words], check=True, capture_output=True)
    return paths


def main() -> None:
    """Measure, print a table, and write the numbers to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="runs of each command")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="commands whose first word is one of these")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    chosen = {text: kind for text, kind in COMMANDS.items() if not args.only or text.split()[0] in args.only}
    found = {"import torch": cpu_seconds([sys.executable, "-c", "import torch"], times=args.times)}
    print(f"| command | CPU s | bound |\n|---|---|---|\n| `import torch` | {found['import torch']:.2f} | |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_inputs(Path(folder))
        for text, (with_torch, until) in chosen.items():
            start = [sys.executable, *(["-m", "looplm"] if until is None else ["-c", until])]
            words = [paths.get(word, word) for word in text.split()]
            try:
                found[text] = cpu_seconds(start + words, times=args.times)
            except SystemExit as error:  # `--version` of an older commit
                print(f"| `{text}` | {str(error).splitlines()[-1]} | |", flush=True)
                continue
            if with_torch is None:
                print(f"| `{text}` | {found[text]:.2f} | |", flush=True)
                continue
            bound = found["import torch"] + ABOVE_TORCH if with_torch else LIGHT
            mark = " (above)" if found[text] > bound else ""
            print(f"| `{text}` | {found[text]:.2f}{mark} | {bound:.2f} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
