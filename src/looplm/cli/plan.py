"""`looplm plan`: what a run needs, before anything is bought."""

from typing import TYPE_CHECKING, Annotated

import typer

from looplm.cli.arguments import JsonSwitch, count_option, refuse_file_for_json

if TYPE_CHECKING:
    from rich.table import Table

    from looplm.train.needs import Needs, Work


def plan(
    recipe: Annotated[str, typer.Argument(help="A run preset (see `looplm config`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes such as data.row_len=2048.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model preset or YAML file.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100-80, a100-40, l40s, l4 or rtx-4090.")] = "h100",
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs.")] = "1,2,4,8,16,32,64",
    tokens: Annotated[
        int | None,
        count_option(
            "--tokens",
            help="Tokens, as 20e9.",
            show_default="the config's tokens, steps or flops, else 20 a parameter",
        ),
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that training reaches.")] = 0.4,
    price: Annotated[
        float | None, typer.Option(help="Dollars per GPU and hour.", show_default="an assumption for each GPU")
    ] = None,
    json_out: JsonSwitch = False,
) -> None:
    """Parameters, FLOPs, memory per GPU, hours and dollars of a run. Reads no data and needs no GPU.

    Examples:

        looplm plan pretrain --gpu h100 --gpus 1,8 --tokens 20e9
        looplm plan mine.yaml data.row_len=2048 --price 2.5 --json
    """
    import json
    from dataclasses import asdict
    from functools import partial

    from looplm.cli.arguments import numbers
    from looplm.cli.tables import print_table
    from looplm.train.needs import USABLE, find_gpu, needs
    from looplm.train.run import resolve_run

    if json_out:
        refuse_file_for_json([word for word in overrides or [] if "=" not in word], json_out=json_out)
    kind = find_gpu(gpu)
    counts = numbers(gpus, option="--gpus")
    config = resolve_run(recipe, overrides=overrides or [], model=model)
    again = ", computed again in the backward pass" if config.train.recompute else ""
    found = needs(
        config,
        gpu=kind,
        n_gpus=counts,
        tokens=tokens,
        mfu=mfu,
        price=price,
        on_work=None if json_out else partial(_print_work, again=again),
    )
    if json_out:
        typer.echo(json.dumps(asdict(found)))
        return
    print_table(_memory(found))
    typer.echo(f"GB per GPU; fits: {USABLE:.0%} of the {kind.memory_gb:g} GB of {gpu} hold it.\n")
    print_table(_cost(found))
    dollars = kind.price if price is None else price
    typer.echo(
        f"At {mfu:.0%} of {kind.tflops:g} TFLOP/s and {dollars:g} dollars per GPU and hour"
        f"{' (assumed)' if price is None else ''}; time between GPUs is not counted."
    )
    few = [n for n in counts if found.accumulate % n]
    if few:
        numbers_of = ", ".join(map(str, few))
        typer.echo(
            f"{numbers_of} GPUs need train.accumulate to be a multiple of their number: it is {found.accumulate}."
        )


def _print_work(work: "Work", *, again: str) -> None:
    """The lines above the tables."""
    loops, batch = work.loops, work.batch
    active = f", {work.active:,} active" if work.active < work.parameters else ""
    gradient = "" if loops.mean == loops.mean_with_gradient else f", {loops.mean_with_gradient:.2f} with gradient"
    typer.echo(f"parameters   {work.parameters:,}{active}")
    typer.echo(f"loops        {loops.mean:.2f} on average{gradient}{again}; memory for {loops.most_with_gradient}")
    typer.echo(f"tokens       {work.tokens:.3g} ({work.tokens_from})")
    typer.echo(f"FLOPs        {work.flops_per_token:.3g} a token, {work.flops:.3g} in all")
    typer.echo(
        f"micro-batch  {batch.n_rows} rows of {batch.row_len} tokens; {work.accumulate} a step, shared by the GPUs"
    )


def _memory(found: "Needs") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=0, pad_edge=False)
    for name in "GPUs weights gradients optimizer gathered activations loss sum fits".split():
        table.add_column(name, justify="left" if name in ("GPUs", "fits") else "right")
    for on in found.on:
        ways = (
            (("", on.ddp, on.ddp_fits),)
            if on.n_gpus == 1
            else (
                (" DDP", on.ddp, on.ddp_fits),
                (" FSDP", on.fsdp, on.fsdp_fits),
            )
        )
        for way, each, fits in ways:
            parts = (each.weights, each.gradients, each.optimizer, each.gathered, each.activations, each.loss)
            sizes = [f"{n_bytes / 1e9:,.{1 if n_bytes >= 1e10 else 2}f}" for n_bytes in (*parts, each.total)]
            table.add_row(f"{on.n_gpus}{way}", *sizes, "yes" if fits else "no")
    return table


def _cost(found: "Needs") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=0, pad_edge=False)
    for name in "GPUs hours dollars".split():
        table.add_column(name, justify="right")
    for on in found.on:
        table.add_row(str(on.n_gpus), *map(_rounded, (on.hours, on.dollars)))
    return table


def _rounded(number: float) -> str:
    return f"{number:,.{0 if number >= 100 else 1 if number >= 1 else 3}f}"
