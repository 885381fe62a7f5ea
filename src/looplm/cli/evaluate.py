"""`looplm eval` and `looplm demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, or builtin:reasoner.")],
    suite: Annotated[
        str | None, typer.Option(help="reasoning or s3. Default: what the run was trained on.", show_default=False)
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Questions per task (500), or sequences per length (200).")] = None,
    loops: Annotated[
        str | None,
        typer.Option(help="Numbers of loops, as 1,2,4,8; for s3 also rules of the length, as n/2,n,1.5n.", show_default=False),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Sequence lengths for s3, as 12,24,64.", show_default=False)] = None,
    questions: Annotated[
        Path | None, typer.Option(help='Your own questions: {"task", "question", "answer"} a line.', show_default=False)
    ] = None,
    harder: Annotated[bool, typer.Option(help="Also score questions beyond the trained ranges.")] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here.", show_default=False)] = None,
) -> None:
    """Score a run: accuracy with 95 % intervals, by number of loops."""
    from looplm.checkpoint import load_run
    from looplm.errors import ConfigError

    if n is not None and n < 1:
        raise ConfigError(f"--n {n} is too small; give 1 or more")
    loaded = load_run(run)
    trained_on = loaded.config.get("data", {}).get("kind")
    chosen = suite or ("reasoning" if questions or trained_on != "permutations" else "s3")
    if chosen not in ("reasoning", "s3"):
        raise ConfigError(f"no suite {chosen!r}; there is reasoning and s3")
    if json_out is not None and not json_out.absolute().parent.is_dir():
        raise ConfigError(f"--json {str(json_out)!r}: the folder {str(json_out.absolute().parent)!r} does not exist; make it first")
    if chosen == "s3":
        if questions is not None or suite == "reasoning":
            raise ConfigError("--questions are text; they need the reasoning suite")
        scores = _staircase(loaded.model, lengths=lengths, loops=loops, n=n)
    else:
        if lengths is not None:
            raise ConfigError("--lengths is for the s3 suite; the reasoning suite takes --n and --loops")
        scores = _reasoning(run, loops=loops, n=n, questions=questions, harder=harder)
    if json_out is not None:
        _write_json(json_out, {"run": run, "suite": chosen, **scores})


def demo(
    minutes: Annotated[float, typer.Option(help="Wall time of the whole demo.")] = 25.0,
    out: Annotated[Path, typer.Option(help="Folder for runs, plots and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of both trainings.")] = 0,
) -> None:
    """Everything once: the built-in reasoner, the loop staircase, a reasoner trained from nothing, and a report."""
    from looplm.cli.demo import run_demo

    run_demo(minutes=minutes, out=out, seed=seed)


def _staircase(model: Any, *, lengths: str | None, loops: str | None, n: int | None) -> dict[str, Any]:
    from looplm.cli.arguments import numbers
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import staircase_table
    from looplm.eval.staircase import LENGTHS, LOOPS, N_SEQUENCES, evaluate_staircase, loops_for

    rules = [part.strip() for part in loops.split(",")] if loops is not None else list(LOOPS)
    chosen = numbers(lengths, option="--lengths") if lengths is not None else list(LENGTHS)
    for rule in rules:
        loops_for(rule, max(chosen))
    with CountProgress("measuring", len(chosen) * len(rules)) as progress:
        rows = evaluate_staircase(
            model, lengths=chosen, rules=rules, n_sequences=n or N_SEQUENCES, on_progress=progress
        )
    staircase_table("exact sequences", {"this run": rows})
    return {"rows": [row.as_dict() for row in rows]}


def _reasoning(
    run: str, *, loops: str | None, n: int | None, questions: Path | None, harder: bool
) -> dict[str, Any]:
    from looplm.cli.arguments import loop_counts
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import reasoning_table
    from looplm.errors import ConfigError
    from looplm.eval.reasoning import evaluate as score
    from looplm.eval.reasoning import held_out_questions, load_reasoner, read_questions

    if questions is not None and n is not None:
        raise ConfigError("--n counts generated questions; with --questions all of the file is scored")
    asked = read_questions(questions) if questions is not None else held_out_questions(n or 500)
    beyond = held_out_questions(min(n or 500, 100), harder=True) if harder and questions is None else []
    reasoner = load_reasoner(run)
    default = reasoner.model.config.n_loops
    counts = loop_counts(loops) if loops is not None else [default]
    headline = default if default in counts else counts[-1]
    with CountProgress("answering", len(asked) * len(counts) + len(beyond)) as progress:
        results = {count: score(reasoner, asked, n_loops=count, on_progress=progress) for count in counts}
        extra = score(reasoner, beyond, n_loops=headline, on_progress=progress) if beyond else None
    columns = {f"{count} loop{'s' if count > 1 else ''}": result.scores for count, result in results.items()}
    reasoning_table("held-out questions, exact match with 95 % interval", columns)
    if extra is not None:
        reasoning_table("beyond the trained ranges (never trained on)", {f"{headline} loops": extra.scores})
    return {
        "n_loops": headline,
        "mean_accuracy": results[headline].mean_accuracy,
        "tasks": {name: each.as_dict() for name, each in results[headline].scores.items()},
        "by_loops": {
            str(count): {name: each.as_dict() for name, each in result.scores.items()}
            for count, result in results.items()
        },
        "harder": {name: each.as_dict() for name, each in extra.scores.items()} if extra is not None else {},
        "mistakes": results[headline].mistakes,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    import json

    from looplm.errors import ConfigError

    try:
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {str(path)!r} cannot be written ({error.strerror})") from None
    typer.echo(f"wrote {path}")
