"""`looplm train`."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looplm.cli.arguments import count_option

if TYPE_CHECKING:
    from looplm.train.fit import FitResult


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A run preset (see `looplm config`) or a YAML file, then changes such as train.seed=1.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to make. Default: runs/RECIPE.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model preset or YAML file.", show_default=False)] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget of wall time.", show_default=False)] = None,
    steps: Annotated[
        int | None, count_option("--steps", help="Budget of optimizer updates.", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None, count_option("--tokens", help="Budget of tokens, as 5e6.", show_default=False)
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget of FLOPs, as 1e15.", show_default=False)] = None,
    seed: Annotated[
        int | None, count_option("--seed", help="Seed of weights, data and plans.", least=0, show_default=False)
    ] = None,
    keep: Annotated[int | None, count_option("--keep", help="Newest checkpoints kept.", show_default="2")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this run folder instead of starting a new one.", show_default=False)
    ] = None,
) -> None:
    """Train a model. Ctrl-C saves a checkpoint and says how to continue.

    On several GPUs or machines: torchrun --nproc-per-node N -m looplm train ...

    Examples:

        looplm train reason --minutes 15 --out runs/r
        looplm train text data.path=book.txt --tokens 5e6 --seed 1
        looplm train --resume runs/r
    """
    from looplm.config import load_preset
    from looplm.errors import ConfigError

    words = list(arguments or [])
    recipe = words.pop(0) if words and "=" not in words[0] else None
    budgets = {"minutes": minutes, "steps": steps, "tokens": tokens, "flops": flops}
    overrides = [*_overrides(budgets, seed=seed, keep=keep), *words]
    if resume is not None and (recipe is not None or out is not None or model is not None):
        raise ConfigError("--resume continues a run as it is: leave out the recipe, --out and --model")
    if resume is None:
        if recipe is None:
            raise ConfigError("no recipe given; try: looplm train reason --minutes 15 --out runs/r")
        load_preset("run", recipe)  # a recipe that is not there is said before anything else
    if os.environ.get("RANK", "0") == "0":
        typer.secho("starting", dim=True)  # the imports below take a while; an error stays one line of stderr
    from looplm.checkpoint import checkpoints
    from looplm.cli.progress import TrainingProgress
    from looplm.dist import is_main
    from looplm.train.run import resolve_run, resume_run, start_run

    train_it: Callable[..., FitResult]
    if resume is not None:
        folder, train_it = resume, partial(resume_run, resume, overrides=overrides)
    else:
        assert recipe is not None
        folder = out or Path("runs") / Path(recipe).stem
        config = resolve_run(
            recipe, overrides=overrides, model=model, on_choice=lambda text: typer.secho(text, dim=True, err=True)
        )
        train_it = partial(start_run, config, folder)
    try:
        with TrainingProgress() as progress:
            result = train_it(observers=(progress,), say=progress.say)
    except KeyboardInterrupt:
        if is_main():
            _say_what_is_kept(folder, checkpoints(folder))
        raise typer.Exit(130) from None
    if is_main():
        _say_how_it_ended(folder, result)


def _overrides(budgets: Mapping[str, float | None], **given: int | None) -> list[str]:
    """The options as changes of the config. A budget replaces the preset's, whatever its unit."""
    found = [f"train.{key}={value}" for key, value in given.items() if value is not None]
    if any(value is not None for value in budgets.values()):
        found += [f"train.{name}={'null' if value is None else value}" for name, value in budgets.items()]
    return found


def _say_what_is_kept(folder: Path, kept: Sequence[Path]) -> None:
    """What a run that was ended at once leaves: its complete checkpoints."""
    typer.echo(
        f"stopped at once; kept: {kept[-1]}; continue with: looplm train --resume {folder}"
        if kept
        else "stopped before the first checkpoint; there is nothing to continue",
        err=True,
    )


def _say_how_it_ended(folder: Path, result: "FitResult") -> None:
    position = result.position
    share = position.seconds_waited / max(position.seconds, 1e-9)
    typer.echo(
        f"{'stopped' if result.interrupted else 'done'}: step {position.step:,}, {position.tokens:,} tokens in "
        f"{position.seconds / 60:.1f} min, loss {result.recent_loss:.4f}, {share:.1%} of the time waiting for data"
    )
    runtime = result.runtime
    threads = f"{runtime.n_threads} thread{'s' if runtime.n_threads > 1 else ''}"
    typer.echo(f"ran on {runtime.device}, {runtime.precision}, {'compiled' if runtime.compile else 'eager'}, {threads}")
    typer.echo(f"saved {result.checkpoint}")
    if result.interrupted:
        typer.echo(f"continue with: looplm train --resume {folder}")
