"""`looplm demo`: the library's main job from end to end, within a stated wall time.

Shares of the time are set so that at 23 minutes the reasoner trains for 15 and everything ends before the time is up.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import typer

from looplm.checkpoint import load, write_text
from looplm.cli.progress import CountProgress, TrainingProgress
from looplm.cli.show import reasoning_table, staircase_table
from looplm.errors import ConfigError, TrainingError
from looplm.eval.interval import Score
from looplm.eval.plots import comparison_plot, loops_plot, loss_plot, staircase_plot
from looplm.eval.reasoning import FORMAT_TASK, Result, evaluate, held_out_questions, load_reasoner
from looplm.eval.report import Report
from looplm.eval.staircase import LENGTHS, LOOPS, Row, evaluate_staircase
from looplm.files import write_whole
from looplm.infer.reasoner import Reasoner, Reply
from looplm.reading import read_json
from looplm.telemetry.history import read_history
from looplm.train.run import resolve_run, start_run

STAIRCASE_SHARE = 0.08  # of the wall time, for each of the three models
REASONER_SHARE = 0.65
EXAMPLES = (
    "What is 47 + 85?",
    "What is (23 + 19) * 6?",
    "Which is larger, 314159 or 314259?",
    "Sort in ascending order: 512 87 300 45",
    "Tom has 12 apples. He buys 7 more. How many apples does Tom have?",
)
# MiniAxion1-0.9M's own card (spec reasoning_tasks): 920,833 parameters, about 80 CPU minutes, no intervals published.
CARD = {
    "arithmetic": 0.033,
    "two_step": 0.10,
    "even_odd": 1.0,
    "comparison": 0.05,
    "pattern": 0.0,
    "word_problem": 0.0,
    "sorting": 0.0,
    FORMAT_TASK: 1.0,
}
CARD_NAME = "MiniAxion1-0.9M, its card"


def run_demo(*, minutes: float, out: Path, seed: int) -> None:
    """Train and measure everything once; writes staircase.png and report.html into `out`."""
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes} is not a wall time; give more than 0")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the demo draws plots with matplotlib, which is not installed: pip install 'looplm[plot]'")
    started = time.perf_counter()
    folder = _new_folder(out)
    _say(f"1. The built-in reasoner, {len(EXAMPLES)} questions")
    _show(_examples(load_reasoner("builtin:reasoner")))
    report = Report("looplm demo")
    _staircase(folder, report, minutes=minutes, seed=seed)
    _reasoner(folder, report, minutes=minutes, seed=seed)
    path = folder / "report.html"
    write_text(path, report.html())
    typer.echo(f"\nreport: {path}   ({(time.perf_counter() - started) / 60:.1f} minutes in all)")
    typer.echo(f"talk to what you trained:   looplm chat {folder / 'reason'}")
    typer.echo("talk to the built-in one:   looplm chat")


def _staircase(folder: Path, report: Report, *, minutes: float, seed: int) -> None:
    _say("2. The loop staircase: one layer of 54k parameters, run over and over, tracks permutations (S3)")
    rows: dict[str, list[Row]] = {}
    share = minutes * STAIRCASE_SHARE
    for name, recipe, rules in (
        ("looped", "s3", LOOPS),
        ("iso-parameter (1 layer, no loop)", "s3-iso-parameter", ("1",)),
        ("iso-FLOP (12 layers, 11x parameters)", "s3-iso-flop", ("1",)),
    ):
        _train(recipe, folder / recipe, minutes=share, seed=seed, label=name)
        model = load(folder / recipe)
        with CountProgress("measuring", len(LENGTHS) * len(rules)) as progress:
            rows[name] = evaluate_staircase(model, rules=rules, on_progress=progress)
    staircase_table("sequences with every position right, %", rows)
    plot = staircase_plot(rows)
    write_whole(folder / "staircase.png", plot)
    typer.echo(f"plot: {folder / 'staircase.png'}")
    report.heading("The loop staircase: permutation tracking in S3")
    report.paragraph(
        f"Trained on lengths up to 12 with at most 14 loops, {share:.1f} minutes each, seed {seed}. A sequence counts "
        f"when every position is right; {rows['looped'][0].exact.n} fresh sequences a point, 95 % Wilson intervals."
    )
    report.image(plot, alt="exact accuracy by length and loops")
    table = [
        [name, row.rule, str(row.length), str(row.loops), f"{100 * row.exact.accuracy:.1f}"]
        for name in rows
        for row in rows[name]
    ]
    report.table(["model", "rule", "length", "loops", "exact %"], table)


def _reasoner(folder: Path, report: Report, *, minutes: float, seed: int) -> None:
    share = minutes * REASONER_SHARE
    _say(f"3. The reasoner, trained from nothing for {share:.1f} minutes")
    run = folder / "reason"
    _train("reason", run, minutes=share, seed=seed, label="reasoner")
    reasoner = load_reasoner(run)
    trained = reasoner.model.config.n_loops
    # the suite's 500 questions a task where there is time for them: answering takes about a tenth of the training
    n = 500 if minutes >= 20 else max(20, int(25 * minutes))
    questions = held_out_questions(n)
    dial_questions = held_out_questions(max(10, n // 10))
    dial_counts = sorted({1, 2, 4, 8, trained})
    beyond = held_out_questions(max(10, n // 10), harder=True)
    total = len(questions) + len(dial_questions) * len(dial_counts) + len(beyond)
    with CountProgress("answering", total) as progress:
        result = evaluate(reasoner, questions, on_progress=progress)
        dial = {count: evaluate(reasoner, dial_questions, n_loops=count, on_progress=progress) for count in dial_counts}
        harder = evaluate(reasoner, beyond, on_progress=progress)
    columns: dict[str, Mapping[str, Score | float]] = {CARD_NAME: CARD, **_saved(), "this run": result.scores}
    _print_scores(columns, n=n)
    reasoning_table(
        f"the dial: accuracy by loops per token, {len(dial_questions) // 7} questions a task",
        {str(count): each.scores for count, each in dial.items()},
    )
    reasoning_table("beyond the trained ranges, never trained on", {f"{trained} loops": harder.scores})
    examples = _examples(reasoner)
    _say("Five worked examples")
    _show(examples)
    _report_reasoner(report, run=run, columns=columns, result=result, dial=dial, harder=harder, examples=examples)


def _report_reasoner(
    report: Report,
    *,
    run: Path,
    columns: Mapping[str, Mapping[str, Score | float]],
    result: Result,
    dial: Mapping[int, Result],
    harder: Result,
    examples: Sequence[tuple[str, Reply]],
) -> None:
    report.heading("The reasoner")
    report.paragraph("Right answers in percent, greedy, exact match, held-out questions, 95 % Wilson intervals.")
    report.scores(columns)
    report.image(comparison_plot(columns), alt="accuracy by task and model")
    report.image(
        loops_plot({count: each.scores for count, each in dial.items()}, trained=str(result.n_loops)),
        alt="accuracy by number of loops",
    )
    records = read_history(run)
    if records:
        report.image(loss_plot(records), alt="training loss")
    report.heading("Beyond the trained ranges")
    report.paragraph("Longer operands, three operations, longer lists: never trained on, reported as they are.")
    report.scores({f"{harder.n_loops} loops": harder.scores})
    report.heading("Worked examples")
    for question, reply in examples:
        report.example(question, reply.completion.steps, reply.completion.answer or reply.text)
    if result.mistakes:
        report.heading("Mistakes")
        keys = ("task", "question", "expected", "answer")
        report.table(keys, [[mistake[key] for key in keys] for mistake in result.mistakes[:40]])


def _train(recipe: str, folder: Path, *, minutes: float, seed: int, label: str) -> None:
    config = resolve_run(recipe, overrides=[f"train.minutes={minutes}", f"train.seed={seed}"])
    with TrainingProgress(label) as progress:
        result = start_run(config, folder, observers=(progress,), say=progress.say)
    if result.interrupted:
        typer.echo(f"stopped in {folder}; continue with: looplm train --resume {folder}")
        raise KeyboardInterrupt


def _saved() -> dict[str, Mapping[str, Score | float]]:
    """Results that ship with the package: models trained on the same data for the same time."""
    path = resources.files("looplm").joinpath("builtin/results.json")
    if not path.is_file():
        return {}
    saved = read_json(Path(str(path)))
    return {
        f"{name} ({entry['minutes']:g} min, saved)": {
            task: Score(round(score["accuracy"] * score["n"]), score["n"]) for task, score in entry["tasks"].items()
        }
        for name, entry in saved.items()
    }


def _print_scores(columns: Mapping[str, Mapping[str, Score | float]], *, n: int) -> None:
    shown = {
        name: {task: value if isinstance(value, Score) else f"{100 * value:.1f}" for task, value in scores.items()}
        for name, scores in columns.items()
    }
    for name, scores in columns.items():
        values = [
            value.accuracy if isinstance(value, Score) else value
            for task, value in scores.items()
            if task != FORMAT_TASK
        ]
        shown[name] = {**shown[name], "mean of the seven": f"{100 * sum(values) / len(values):.1f}"}
    reasoning_table(f"reasoning suite, {n} held-out questions a task, % right [95 %]", shown)


def _examples(reasoner: Reasoner) -> list[tuple[str, Reply]]:
    return list(zip(EXAMPLES, reasoner.answer(EXAMPLES), strict=True))


def _show(examples: Sequence[tuple[str, Reply]]) -> None:
    for question, reply in examples:
        typer.echo(question)
        for step in reply.completion.steps:
            typer.secho(f"    {step}", dim=True)
        typer.echo(f"  {reply.completion.answer if reply.completion.answer is not None else reply.text}")


def _say(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


def _new_folder(out: Path) -> Path:
    """`out`, or `out-2`, `out-3` ... if it is taken: a demo never writes over an earlier one."""
    folder, number = out, 1
    while folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"folder {str(folder)!r} cannot be made ({error.strerror}); give another --out") from None
    return folder
