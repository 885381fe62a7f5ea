"""`looplm eval`, `looplm calibrate` and `looplm demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from looplm.cli.arguments import Device, DType, count_option, early_exit
from looplm.cli.outputs import check_json, check_plot, check_writable, stdout_for_json, write_file, write_json
from looplm.errors import ConfigError

SUITES = ("reasoning", "s3", "loops")
MOST_QUESTIONS = 100_000
NO_TEXT = "is where a text is; this suite's questions are generated"
SuiteName = Annotated[
    str | None,
    typer.Option(
        help="reasoning, s3, or loops: what the run was trained on, over the whole dial. Default: by the run.",
        show_default=False,
    ),
]
NQuestions = Annotated[
    int | None,
    count_option(
        "--n",
        help="Questions per task (500; loops: 100), or sequences per length (200).",
        most=MOST_QUESTIONS,
        show_default=False,
    ),
]
LoopCounts = Annotated[
    str | None,
    typer.Option(
        help="Numbers of loops, as 1,2,4,8; for s3 also rules of the length, as n/2,n,1.5n.", show_default=False
    ),
]
Harder = Annotated[
    bool | None,
    typer.Option("--harder/--no-harder", help="Also score questions beyond the trained ranges.", show_default="on"),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Where a run's text is now: the file, or the prepared folder.", show_default="as trained on"),
]
Lengths = Annotated[str | None, typer.Option(help="Sequence lengths for s3, as 12,24,64.", show_default=False)]


def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, or builtin:reasoner.")],
    suite: SuiteName = None,
    n: NQuestions = None,
    loops: LoopCounts = None,
    lengths: Lengths = None,
    questions: Annotated[
        Path | None, typer.Option(help='Your own questions: {"task", "question", "answer"} a line.', show_default=False)
    ] = None,
    harder: Harder = None,
    exit_rule: Annotated[
        str | None,
        typer.Option(
            "--exit",
            help="Stop each token's loops by a rule, as latent:0.001 (or kl, entropy, stable), or by the `calibrated` "
            "one of the run.",
            show_default=False,
        ),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(
            help="With --exit, for text: the keys of skipped loops, recompute or last.", show_default="recompute"
        ),
    ] = None,
    data: Data = None,
    device: Device = "cpu",
    dtype: DType = "fp32",
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Write the scores to this file; - prints them and nothing else.", metavar="FILE"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the loops suite into this .png, .svg or .pdf.", show_default=False)
    ] = None,
) -> None:
    """Score a run: accuracy with 95 % intervals, by number of loops.

    Examples:

        looplm eval builtin:reasoner --n 100
        looplm eval runs/s3 --lengths 12,24 --loops n,2n
        looplm eval runs/r --suite loops --plot dial.png
        looplm eval runs/r --questions mine.jsonl --json -
    """
    from looplm.checkpoint import load_run

    _check_given(suite=suite, missing=missing, exit_rule=exit_rule)
    check_json(json_out)
    if plot is not None:
        check_plot(plot, option="--plot")
    loaded = load_run(run, device=device, dtype=dtype)
    trained_on = loaded.config.get("data", {}).get("kind")
    if suite is None:
        # questions of one's own are for the reasoning suite, whatever the run
        by_kind = {"permutations": "s3", "bytes": "loops", "prepared": "loops"}
        suite = "reasoning" if questions is not None else by_kind.get(trained_on, "reasoning")
    if plot is not None and suite != "loops":
        raise ConfigError("--plot draws the loops suite; add --suite loops")
    with stdout_for_json(json_out):
        if suite == "loops":
            others = {"--questions": questions, "--harder": harder, "--lengths": lengths, "--exit": exit_rule}
            _refuse(others, "is for the other suites; loops takes --n, --loops, --data and --plot")
            scores = _dial(loaded, run=run, loops=loops, n=n, data=data, plot=plot)
        elif suite == "s3":
            others = {"--questions": questions, "--harder": harder, "--missing": missing}
            _refuse(others, "is for the reasoning suite; s3 takes --lengths, --loops, --exit and --n")
            _refuse({"--data": data}, NO_TEXT)
            scores = _staircase(loaded.model, run=run, lengths=lengths, loops=loops, n=n, exit_=exit_rule)
        else:
            _refuse({"--lengths": lengths}, "is for the s3 suite; the reasoning suite takes --n and --loops")
            _refuse({"--data": data}, NO_TEXT)
            if questions is not None and (n is not None or harder is not None):
                raise ConfigError(
                    "--n and --harder choose generated questions; with --questions the whole file is scored"
                )
            early = None if exit_rule is None else early_exit(exit_rule, run=run, missing=missing)
            options: dict[str, Any] = {"loops": loops, "n": n, "questions": questions, "harder": harder}
            scores = _reasoning(loaded, run=run, early=early, **options)
    write_json(json_out, {"run": run, "suite": suite, **scores})


def demo(
    minutes: Annotated[float, typer.Option(help="Wall time of the whole demo.")] = 23.0,
    out: Annotated[Path, typer.Option(help="Folder for runs, plots and report.")] = Path("demo"),
    seed: Annotated[int, count_option("--seed", help="Seed of all trainings.", least=0)] = 0,
) -> None:
    """Everything once: the built-in reasoner, the loop staircase, a reasoner trained from nothing, and a report.

    Examples:

        looplm demo
        looplm demo --minutes 5 --out quick
    """
    from looplm.cli.demo import run_demo

    run_demo(minutes=minutes, out=out, seed=seed)


def calibrate(
    run: Annotated[str, typer.Argument(help="A run folder of `looplm train s3` or `looplm train reason-deep`.")],
    max_loss: Annotated[float, typer.Option(help="Most accuracy to lose, as a share: 0.005 is half a point.")] = 0.005,
    confidence: Annotated[float, typer.Option(help="Probability with which that holds.")] = 0.95,
    rule: Annotated[
        str | None,
        typer.Option(
            help="What is measured: latent, kl, entropy, stable or gate.", show_default="s3: latent; text: entropy"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="For s3: sequence lengths, an equal share of each.", show_default="12,24,48"),
    ] = None,
    loops: Annotated[
        str | None,
        typer.Option(help="Full depth; for s3 by length.", show_default="the run's own; s3: 2n"),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(help="For text: the keys of skipped loops, recompute or last.", show_default="recompute"),
    ] = None,
    n: Annotated[
        int, count_option("--n", help="Fresh questions to calibrate on, all tasks together.", most=MOST_QUESTIONS)
    ] = 1000,
    device: Device = "cpu",
    dtype: DType = "fp32",
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Write all trials to this file; - prints them and nothing else.", metavar="FILE"),
    ] = None,
) -> None:
    """Find the exit rule that saves most loops and keeps the accuracy, and store it in the run (exit.json).

    Examples:

        looplm calibrate runs/s3 --lengths 12,24
        looplm calibrate runs/deep --rule entropy --max-loss 0.01
        looplm eval runs/deep --exit calibrated
    """
    from looplm.checkpoint import load_run, run_folder
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import trials_table
    from looplm.eval.exits import FILE, GRIDS, TEXT_GRIDS, as_calibration, as_record, check_promise, weights_name
    from looplm.eval.exits import calibrate as find
    from looplm.infer.decoders import EarlyExit

    for option, share in (("--max-loss", max_loss), ("--confidence", confidence)):
        if not 0 < share < 1:
            raise ConfigError(f"{option} {share:g} is a share: give a number between 0 and 1")
    check_promise(n, max_loss=max_loss, confidence=confidence)
    if rule is not None and ":" in rule:
        raise ConfigError(f"--rule {rule!r} names a threshold, which is what calibration finds; give the kind alone")
    folder = run_folder(run)
    check_json(json_out)
    check_writable(folder / FILE, option="RUN")
    loaded = load_run(run, device=device, dtype=dtype)
    is_s3 = loaded.config.get("data", {}).get("kind") == "permutations"
    early = EarlyExit.parse(rule or ("latent" if is_s3 else "entropy"), missing=missing)
    kind = early.rule.kind
    if is_s3:
        _refuse({"--missing": missing}, "is for text; sequences are scored whole")
        grids = GRIDS
        make, asked = _sequence_trials(loaded, lengths=lengths or "12,24,48", loops=loops or "2n", n=n)
    else:
        _refuse({"--lengths": lengths}, "is for s3")
        grids = TEXT_GRIDS
        make, asked = _question_trials(loaded, run=run, loops=loops, n=n, missing=early.missing)
    with CountProgress("measuring", n * (1 + len(grids[kind]))) as progress:
        tried, best = find(make(progress), kind=kind, max_loss=max_loss, confidence=confidence)
    promise: dict[str, Any] = {"max_loss": max_loss, "confidence": confidence, "missing": early.missing, "asked": asked}
    found = as_calibration(best, **promise, weights=weights_name(folder))
    found.save(folder)
    with stdout_for_json(json_out):
        trials_table(tried, best, confidence=confidence)
        typer.echo(
            f"{found.rule}: {100 * best.saved:.0f} % fewer loops; at most {100 * found.bound:.2f} points lost with "
            f"confidence {confidence:g}. Stored in {folder / FILE}; use it with --exit calibrated"
        )
    write_json(json_out, {"run": run, "trials": [as_record(trial, confidence=confidence) for trial in tried]})


def _sequence_trials(loaded: Any, *, lengths: str, loops: str, n: int) -> tuple[Any, str]:
    """A function from a progress callback to trials on permutations, and what the trials ask."""
    from looplm.cli.arguments import numbers
    from looplm.eval.exits import CALIBRATION_SEED, SequenceTrials
    from looplm.eval.staircase import loops_for

    chosen = numbers(lengths, option="--lengths")
    loops_for(loops, max(chosen))

    def make(progress: Any) -> Any:
        options: dict[str, Any] = {"n_sequences": n, "seed": CALIBRATION_SEED, "on_progress": progress}
        return SequenceTrials(loaded.model, lengths=chosen, loops=loops, **options)

    return make, f"{n} sequences of {lengths} permutations, {loops} loops"


def _question_trials(loaded: Any, *, run: str, loops: str | None, n: int, missing: Any) -> tuple[Any, str]:
    """A function from a progress callback to trials on the reasoning suite, and what the trials ask."""
    from looplm.cli.arguments import loop_counts
    from looplm.eval.exits import CALIBRATION_SEED, QuestionTrials
    from looplm.eval.reasoning import as_reasoner

    reasoner = as_reasoner(loaded, run=run)
    counts = [reasoner.model.config.n_loops] if loops is None else loop_counts(loops)
    if len(counts) > 1:
        raise ConfigError(f"--loops {loops!r}: a rule is calibrated for one full depth; give one number")
    n_loops = counts[0]

    def make(progress: Any) -> Any:
        options: dict[str, Any] = {"seed": CALIBRATION_SEED, "missing": missing, "on_progress": progress}
        return QuestionTrials(reasoner, n=n, n_loops=n_loops, **options)

    return make, f"{n} held-out questions of the reasoning suite, {n_loops} loops"


def _staircase(
    model: Any, *, run: str, lengths: str | None, loops: str | None, n: int | None, exit_: str | None
) -> dict[str, Any]:
    from looplm.cli.arguments import numbers
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import staircase_table
    from looplm.eval.staircase import LENGTHS, LOOPS, N_SEQUENCES, evaluate_staircase, loops_for

    rules = [part.strip() for part in loops.split(",")] if loops is not None else list(LOOPS)
    chosen = numbers(lengths, option="--lengths") if lengths is not None else list(LENGTHS)
    for rule in rules:
        loops_for(rule, max(chosen))
    exit_rule = None if exit_ is None else early_exit(exit_, run=run, missing=None).rule
    with CountProgress("measuring", len(chosen) * len(rules)) as progress:
        rows = evaluate_staircase(
            model,
            lengths=chosen,
            rules=rules,
            n_sequences=n or N_SEQUENCES,
            exit_rule=exit_rule,
            on_progress=progress,
        )
    title = "exact sequences" if exit_rule is None else f"exact sequences (mean loops), tokens stop by {exit_rule}"
    staircase_table(title, {"this run": rows})
    beside = {} if exit_rule is None else {"exit": str(exit_rule)}
    return {**beside, "rows": [row.as_dict() for row in rows]}


def _dial(
    loaded: Any, *, run: str, loops: str | None, n: int | None, data: Path | None, plot: Path | None
) -> dict[str, Any]:
    from looplm.checkpoint import run_folder
    from looplm.cli.arguments import loop_counts
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import dial_table
    from looplm.eval.held_out import located_text
    from looplm.eval.loops import TEXT_KINDS, dial_counts, dial_work, measure_dial, trained_depth
    from looplm.eval.plots import dial_plot

    if loaded.config.get("data", {}).get("kind") in TEXT_KINDS:
        _refuse({"--n": n}, "counts questions or sequences; of a text, all held-out tokens are scored")
        text = located_text(loaded, folder=run_folder(run), given=data)
        loaded.config["data"] = text.model_dump(mode="json")
    else:
        _refuse({"--data": data}, NO_TEXT)
    trained = trained_depth(loaded)
    counts = sorted({*(loop_counts(loops) if loops is not None else dial_counts(trained)), trained})
    default = 200 if loaded.config["data"]["kind"] == "permutations" else 100
    with CountProgress("measuring loops", dial_work(counts, trained=trained)) as progress:
        dial = measure_dial(loaded, counts=counts, n=n or default, on_progress=progress)
    dial_table(dial)
    if plot is not None:
        write_file(plot, dial_plot(dial, form=plot.suffix.lower().removeprefix(".")), option="--plot")
    return dial.as_dict()


def _reasoning(
    loaded: Any, *, run: str, early: Any, loops: str | None, n: int | None, questions: Path | None, harder: bool | None
) -> dict[str, Any]:
    from looplm.cli.arguments import loop_counts
    from looplm.cli.progress import CountProgress
    from looplm.cli.show import reasoning_table
    from looplm.eval.reasoning import as_reasoner, held_out_questions, read_questions
    from looplm.eval.reasoning import evaluate as score

    reasoner = as_reasoner(loaded, run=run)
    default = reasoner.model.config.n_loops
    counts = loop_counts(loops) if loops is not None else [default]
    headline = default if default in counts else counts[-1]
    asked = read_questions(questions) if questions is not None else held_out_questions(n or 500)
    wants_harder = questions is None and harder is not False
    beyond = held_out_questions(min(n or 500, 100), harder=True) if wants_harder else []
    with CountProgress("answering", len(asked) * len(counts) + len(beyond)) as progress:
        options: dict[str, Any] = {"early": early, "on_progress": progress}
        results = {count: score(reasoner, asked, n_loops=count, **options) for count in counts}
        extra = score(reasoner, beyond, n_loops=headline, **options) if beyond else None
    columns = {
        f"{count} loop{'s' if count > 1 else ''}" if early is None else f"{result.mean_loops:.2f} of {count}": (
            result.scores
        )
        for count, result in results.items()
    }
    source = f"questions of {questions}" if questions is not None else f"{n or 500} held-out questions a task"
    rule = "" if early is None else f", mean loops a token, tokens stop by {early}"
    reasoning_table(f"{source}, % right, greedy, exact match [95 % interval]{rule}", columns)
    if extra is not None:
        n_extra = min(n or 500, 100)
        reasoning_table(
            f"beyond the trained ranges, never trained on, {n_extra} a task", {f"{headline} loops": extra.scores}
        )
    return {
        "n_loops": headline,
        **({} if early is None else {"exit": str(early), "mean_loops": results[headline].mean_loops}),
        "mean_accuracy": results[headline].mean_accuracy,
        "tasks": {name: each.as_dict() for name, each in results[headline].scores.items()},
        "by_loops": {
            str(count): {name: each.as_dict() for name, each in result.scores.items()}
            for count, result in results.items()
        },
        "harder": {name: each.as_dict() for name, each in extra.scores.items()} if extra is not None else {},
        "mistakes": results[headline].mistakes,
    }


def _check_given(*, suite: str | None, missing: str | None, exit_rule: str | None) -> None:
    """Refuse values that are wrong for every run."""
    from looplm.config import did_you_mean

    if suite not in (None, *SUITES):
        raise ConfigError(f"no suite {suite!r}{did_you_mean(suite, SUITES)} Suites: {', '.join(SUITES)}.")
    if missing is not None and exit_rule is None:
        raise ConfigError("--missing belongs to --exit; give --exit too")


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Refuse options that the chosen suite would ignore."""
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} {reason}")
