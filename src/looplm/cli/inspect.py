"""`looplm count` and `looplm config`: what a preset is, before anything is trained."""

from typing import Annotated

import typer

from looplm.cli.arguments import JsonSwitch, refuse_file_for_json


def count(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model preset, a YAML file, a run folder or builtin:reasoner.")],
    loops: Annotated[
        str, typer.Option(help="Numbers of loops to count FLOPs for, as 1,2,4,8.", show_default=True)
    ] = "1,2,4,8",
    json_out: JsonSwitch = False,
) -> None:
    """Parameters, FLOPs and cache per token by number of loops, beside what was published.

    Examples:

        looplm count nrm-0.9m
        looplm count runs/r --loops 1,4,16 --json
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from rich.table import Table

    from looplm.checkpoint import BUILTIN, run_model_config
    from looplm.cli.arguments import loop_counts
    from looplm.cli.tables import print_table
    from looplm.config import load_preset, parse, published_sizes
    from looplm.model.count import count as count_model
    from looplm.model.looped import ModelConfig

    refuse_file_for_json(ctx.args, json_out=json_out)
    if model.startswith(BUILTIN) or Path(model).is_dir():
        config = run_model_config(model)
    else:
        config = parse(ModelConfig, load_preset("model", model), source=f"model {model!r}")
    counts = [count_model(config, n_loops=n) for n in loop_counts(loops)]
    if json_out:
        typer.echo(json.dumps([asdict(each) for each in counts]))
        return
    first, default = counts[0], count_model(config)
    typer.echo(f"{model}: {first.parameters:,} parameters ({first.embedding:,} embedding, {first.core:,} in the loop)")
    if first.active < first.parameters:
        typer.echo(f"{first.active:,} active: a token is sent to some experts only")
    table = Table()
    for header in (
        "n_loops",
        "unrolled\nparameters",
        "decoding\nFLOPs/token",
        "training\nFLOPs/token",
        "fp32 KV\nbytes/token",
    ):
        table.add_column(header, justify="right")
    for each in counts:
        numbers = (each.unrolled, each.flops_per_token, each.training_flops_per_token, 4 * each.kv_numbers_per_token)
        table.add_row(str(each.n_loops), *(f"{number:,}" for number in numbers))
    print_table(table)
    typer.echo(
        f"FLOPs at a context of {config.seq_len // 2} tokens, half of seq_len; n_loops is {config.n_loops} by default."
    )
    published = published_sizes(model)
    if published:
        source = published.pop("source")
        beside = Table(
            f"at {config.n_loops} loops", "ours", "published", title=f"Published: {source}", title_justify="left"
        )
        for name, value in published.items():
            ours = getattr(default, name)
            beside.add_row(name.replace("_", " "), f"{ours:,}", f"{value:,}" if isinstance(value, int) else value)
        print_table(beside)


def config(
    recipe: Annotated[str | None, typer.Argument(help="A run preset or YAML file; none lists the presets.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes such as train.seed=1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model preset or YAML file.", show_default=False)] = None,
) -> None:
    """Print the resolved config of a run, which is itself a valid recipe.

    Examples:

        looplm config
        looplm config reason train.seed=1 > mine.yaml
    """
    from looplm.config import preset_names, to_yaml

    if recipe is None:
        typer.echo(f"run presets:   {', '.join(preset_names('run'))}")
        typer.echo(f"model presets: {', '.join(preset_names('model'))}")
        return
    from looplm.train.run import resolve_run

    typer.echo(to_yaml(resolve_run(recipe, overrides=overrides or [], model=model)), nl=False)
