"""`looplm compare`."""

from pathlib import Path
from typing import Annotated

import typer

from looplm.cli.arguments import count_option


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]...",
            help="A looped run preset or YAML file (s3, reason-deep, text), then changes such as data.path=FILE.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the runs and the report. Default: compare/RECIPE.", show_default=False),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Approximate minutes of a looped run; more where sequences grow.")
    ] = 3.0,
    seeds: Annotated[int, count_option("--seeds", help="Runs of every arm, seeds 0, 1, ...")] = 3,
    jobs: Annotated[int, count_option("--jobs", help="Runs at a time, each with its share of the cores.")] = 1,
) -> None:
    """Train a looped model and its baselines (equal parameters, FLOPs, wall time) and report which is better.

    Ctrl-C keeps what was trained: the same command continues.

    Examples:

        looplm compare s3 --minutes 3 --seeds 3
        looplm compare text data.path=book.txt --out compare/book
    """
    import importlib.util
    import json
    import shlex

    from looplm.checkpoint import write_text
    from looplm.errors import ConfigError
    from looplm.eval.plots import arms_plot
    from looplm.files import write_whole
    from looplm.train.compare import Comparison, as_records, markdown, verdicts
    from looplm.train.run import resolve_run

    recipe, *overrides = arguments
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("compare draws with matplotlib, which is not installed: pip install 'looplm[plot]'")
    config = resolve_run(recipe, overrides=overrides)
    folder = out or Path("compare") / Path(recipe).stem

    def say(text: str) -> None:
        typer.secho(text, dim=True, err=True)

    comparison = Comparison(config, folder, minutes=minutes, n_seeds=seeds, n_jobs=jobs, say=say)
    say(f"about {comparison.expected_minutes:.0f} minutes in all; what is already trained in {folder} is kept")
    try:
        found = comparison.run()
    except KeyboardInterrupt:
        say("stopped; what was trained is kept, and the same command continues")
        raise typer.Exit(130) from None
    words = ["looplm", "compare", *arguments, "--minutes", f"{minutes:g}", "--seeds", str(seeds), "--jobs", str(jobs)]
    threads = f"{comparison.n_threads} thread{'s' if comparison.n_threads > 1 else ''}"
    machine = f"{jobs} run{'s' if jobs > 1 else ''} at a time, {threads} each"
    title = f"{recipe}: looped against its baselines"
    write_text(folder / "report.md", markdown(found, title=title, command=shlex.join(words), machine=machine))
    write_text(folder / "report.json", json.dumps(as_records(found), indent=1) + "\n")
    write_whole(folder / "report.png", arms_plot({arm.name: arm.scores for arm in found}))
    for line in verdicts(found):
        typer.echo(line)
    typer.echo(f"report: {folder / 'report.md'}")
