"""Make package data of trained runs: the built-in reasoner's weights, and the scores the demo shows beside its own.

python recipes/builtin.py reasoner RUN        a run of `reason`: bf16 weights, config and a README into the package
python recipes/builtin.py reasoner-deep RUN   a run of `reason-deep`, and its calibrated exit rule
python recipes/builtin.py score NAME RUN      500 held-out questions a task into src/looplm/builtin/results.json
"""

import json
import sys
from pathlib import Path

import torch

from looplm.checkpoint import CONFIG, MARKER, MODEL, load_run, read_state, run_folder, save_weights
from looplm.checksums import write_checksums
from looplm.eval.reasoning import Result, evaluate, held_out_questions, load_reasoner

BUILTIN = Path(__file__).parents[1] / "src" / "looplm" / "builtin"
N_QUESTIONS = 500
COMMAND = "looplm train {recipe} --seed {seed} {budget}"


def describe(run: Path, *, recipe: str) -> dict[str, float | int | str]:
    """How the run was made."""
    train, state = load_run(run).config["train"], read_state(run)
    position, threads = state["position"], state["runtime"]["n_threads"]
    budget = f"--minutes {train['minutes']:g}" if train["minutes"] else f"--steps {train['steps']}"
    return {
        "command": COMMAND.format(recipe=recipe, seed=train["seed"], budget=budget),
        "minutes": round(position["seconds"] / 60, 1),
        "steps": position["step"],
        "tokens": position["tokens"],
        "on": f"{threads} thread{'s' if threads > 1 else ''}",
    }


def write_reasoner(run: Path, *, name: str) -> None:
    """The newest checkpoint of `run` as `builtin:NAME`, scored as it will be loaded: rounded to bf16."""
    folder, recipe = BUILTIN / name, name.replace("reasoner", "reason")
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_run(run)
    save_weights(loaded.model, folder / MODEL, dtype=torch.bfloat16)
    write_checksums(folder / MARKER, [MODEL])
    (folder / CONFIG).write_bytes((run_folder(run) / CONFIG).read_bytes())
    made = describe(run, recipe=recipe)
    result = evaluate(load_reasoner(folder), held_out_questions(N_QUESTIONS))
    rows = [
        f"| {task} | {100 * s.accuracy:.1f} | {100 * s.interval[0]:.1f} to {100 * s.interval[1]:.1f} |"
        for task, s in result.scores.items()
    ]
    (folder / "README.md").write_text(
        f"# builtin:{name}\n\n"
        f"Made by `{made['command']}` on {made['on']} of a CPU ({made['minutes']} minutes, {made['steps']:,} steps, "
        f"{made['tokens']:,} tokens), then rounded to bf16 by `python recipes/builtin.py {name} RUN`.\n\n"
        f"`looplm eval builtin:{name} --suite reasoning --n {N_QUESTIONS}`, {result.n_loops} loops:\n\n"
        "| task | % right | 95 % interval |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        encoding="utf-8",
    )
    show(result)


def write_score(name: str, run: Path) -> None:
    """Add the scores of `run` under `name`."""
    result = evaluate(load_reasoner(run), held_out_questions(N_QUESTIONS))
    path = BUILTIN / "results.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tasks = {task: score.as_dict() for task, score in result.scores.items()}
    saved[name] = {**describe(run, recipe="reason-nrm"), "n_loops": result.n_loops, "tasks": tasks}
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    show(result)


def show(result: Result) -> None:
    """A line per task."""
    for task, score in result.scores.items():
        print(f"{task:14} {100 * score.accuracy:5.1f} %")


def main(arguments: list[str]) -> None:
    """See the module's first lines."""
    match arguments:
        case ["reasoner" | "reasoner-deep" as name, run]:
            write_reasoner(Path(run), name=name)
        case ["score", name, run]:
            write_score(name, Path(run))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
