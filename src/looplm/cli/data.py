"""`looplm data`: text made ready for training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from looplm.cli.arguments import Field, Sources, count_option, fields

app = typer.Typer(no_args_is_help=True, help="Make text ready for training.")


@app.callback()
def _data() -> None:
    """Make text ready for training."""


@app.command()
def prepare(
    sources: Sources = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards.")] = Path("prepared"),
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A folder of `looplm tokenizer train`, or a tokenizer.json.", show_default=False),
    ] = None,
    field: Field = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept away from training.")] = 0.01,
    fim: Annotated[float, typer.Option(help="Share of the documents turned into prefix, suffix, middle.")] = 0.0,
    shard_tokens: Annotated[int, count_option("--shard-tokens", help="Tokens of a shard.")] = 1 << 24,
    seed: Annotated[int, count_option("--seed", help="Seed of the order within shards.", least=0)] = 0,
    inspect: Annotated[bool, typer.Option("--inspect", help="Show what OUT holds instead of making it.")] = False,
) -> None:
    """Tokenise text into memory-mapped shards, on all cores. Stopped, the same command continues.

    Examples:

        looplm data prepare texts/ --tokenizer tok --out prepared
        looplm data prepare notes.jsonl --field body --tokenizer tok
        looplm data prepare --inspect --out prepared
    """
    from looplm.config import parse
    from looplm.data.bpe import load_tokenizer
    from looplm.data.manifest import HELD_OUT, MANIFEST, TRAIN, PrepareConfig, read_manifest
    from looplm.data.prepare import prepare as write
    from looplm.data.records import Skipped
    from looplm.errors import ConfigError

    if inspect:
        if sources:
            raise ConfigError("--inspect looks at what --out holds; leave out the sources")
        _inspect(out)
        return
    if not sources:
        raise ConfigError("no source given; for example: looplm data prepare texts/ --tokenizer tok --out prepared")
    if tokenizer is None:
        raise ConfigError("no --tokenizer given; make one with: looplm tokenizer train --out tok SOURCE...")
    given = {"sources": sources, "field": fields(field), "held_out": held_out, "fim": fim, "shard_tokens": shard_tokens}
    config = parse(PrepareConfig, {**given, "seed": seed}, source="looplm data prepare")
    is_done = (out / MANIFEST).is_file() and read_manifest(out).complete
    try:
        with _BytesProgress() as progress:
            manifest = write(config, load_tokenizer(tokenizer), out, on_progress=progress)
    except KeyboardInterrupt:
        typer.secho("stopped; the same command continues from the last finished shard", dim=True, err=True)
        raise typer.Exit(130) from None
    if is_done:
        typer.secho(f"{out} was complete already, and its text and options are as they were", dim=True, err=True)
    n_bytes = sum(shard.n_bytes for shard in manifest.shards)
    n_tokens = {split: manifest.n_tokens(split) for split in (TRAIN, HELD_OUT)}
    typer.echo(
        f"{n_tokens[TRAIN]:,} tokens to train on, {n_tokens[HELD_OUT]:,} held out, "
        f"{n_bytes / max(1, sum(n_tokens.values())):.2f} bytes a token, in {out}"
    )
    for line in Skipped(manifest.skipped).lines():
        typer.echo(line)
    typer.echo(
        f"look at it: looplm data prepare --inspect --out {out}; use it: looplm train pretrain data.folders={out}"
    )


class _BytesProgress:
    """How much text is done; the length of a stream is not known."""

    def __init__(self) -> None:
        import sys

        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (SpinnerColumn(), TextColumn("tokenising"), DownloadColumn(), SpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "_BytesProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def __call__(self, n_bytes: int) -> None:
        self._bar.advance(self._task, n_bytes)


def _inspect(folder: Path) -> None:
    """Every shard with its checksum checked, and how some documents begin."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from looplm.cli.progress import CountProgress
    from looplm.data.bpe import load_tokenizer
    from looplm.data.manifest import TRAIN, checksum
    from looplm.data.prepared import TokenStream
    from looplm.data.records import Skipped
    from looplm.errors import DataError

    stream = TokenStream(folder, split=TRAIN)
    manifest = stream.manifest
    table = Table("shard", "documents", "tokens", "bytes/token", "checksum", title=str(folder), title_justify="left")
    wrong = []
    with CountProgress("checking shards", len(manifest.shards)) as progress:
        for shard in manifest.shards:
            is_right = checksum(folder / shard.name) == shard.sha256
            wrong += [] if is_right else [shard.name]
            sizes = f"{shard.n_documents:,}", f"{shard.n_tokens:,}", f"{shard.n_bytes / shard.n_tokens:.2f}"
            table.add_row(shard.name, *sizes, "right" if is_right else "[red]WRONG[/red]")
            progress(1)
    console = Console()
    console.print(table)
    console.print(
        f"[dim]of {escape(', '.join(manifest.config.sources))}; {manifest.vocab_size:,} kinds of tokens[/dim]"
    )
    for line in Skipped(manifest.skipped).lines():
        console.print(f"[dim]{escape(line)}[/dim]")
    if wrong:
        raise DataError(f"{', '.join(wrong)} of {str(folder)!r} are not what was written: prepare the folder anew")
    tokenizer = load_tokenizer(folder)
    starts = [0, *stream.ends[:-1].tolist()]
    for number in sorted({0, len(starts) // 3, 2 * len(starts) // 3}):
        start, end = starts[number], int(stream.ends[number])
        text = tokenizer.decode(stream.read(start, min(60, end - start)).tolist(), skip_special_tokens=False)
        console.print(f"[bold]document {number:,}[/bold] ({end - start:,} tokens): {escape(repr(text))}")
