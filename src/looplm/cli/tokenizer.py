"""`looplm tokenizer`."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from looplm.cli.arguments import Field, Sources, count_option, fields

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from looplm.data.sample import Sample

app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
T = TypeVar("T")

# Of datasets for which a figure of GPT-2's tokenizer was published. FineWeb-Edu: 4,991,242 bytes of its validation text
# in 1,075,364 tokens (nanochat's scripts/tok_eval.py, in the report on the model card
# nanochat-students/nanochat-tokenizer-2B, 2025-10-14). What it prints of single snippets says nothing of a corpus.
GPT2_BYTES_PER_TOKEN = {"HuggingFaceFW/fineweb-edu": 4.64, "karpathy/fineweb-edu-100b-shuffle": 4.64}


@app.callback()
def tokenizer() -> None:
    """Train tokenizers."""


@app.command("train")
def train(
    sources: Sources = None,
    out: Annotated[Path, typer.Option(help="Folder to save it in.")] = Path("tokenizer"),
    vocab: Annotated[int, count_option("--vocab", help="Tokens in all, 14 tags and 256 bytes among them.")] = 65536,
    digits: Annotated[
        int,
        count_option(
            "--digits", help="Most digits in one token, 1 to 3. One is best for arithmetic, 3 for short texts."
        ),
    ] = 1,
    field: Field = None,
    sample_bytes: Annotated[
        int,
        count_option("--sample-bytes", help="Most text to learn from, in bytes, an equal share of each source."),
    ] = 1_000_000_000,
) -> None:
    """Train a byte-level BPE tokenizer and say how well it compresses each source.

    It is saved in the form that Hugging Face reads, with a chat template. Ctrl-C stops and writes nothing.

    Examples:

        looplm tokenizer train texts/ --vocab 32768 --out tok
        looplm tokenizer train builtin:python --sample-bytes 5e7 --out tok
    """
    from looplm.cli.progress import CountProgress
    from looplm.data.bpe import check_new, check_options, save_tokenizer, train_bpe
    from looplm.data.sample import Sample
    from looplm.files import lock_folder

    check_new(out)
    check_options(vocab_size=vocab, digits=digits)
    sample = Sample(sources or [], n_bytes=sample_bytes, field=fields(field))
    try:
        with lock_folder(out):
            typer.secho(
                f"reading up to {sample_bytes / 1e6:,g} MB of text, then learning the merges", dim=True, err=True
            )
            with CountProgress("text read, MB", max(1, round(sample_bytes / 1e6))) as progress:
                texts = sample.texts(lambda n_more: progress(n_more / 1e6))
                trained = _in_background(lambda: train_bpe(texts, vocab_size=vocab, digits=digits))
            save_tokenizer(trained, out)
    except KeyboardInterrupt:
        typer.secho("stopped; nothing was written", dim=True, err=True)
        # the thread cannot be told to stop, and one that is still in native code breaks Python's own way out
        os._exit(130)
    finally:  # also where nothing was left to learn from
        if sample.skipped:
            typer.echo(f"skipped {sample.skipped}")
    _report(trained, sample)
    n_documents = sum(source.n_documents for source in sample.sources)
    typer.echo(f"saved {out}: {vocab:,} tokens, from {n_documents:,} documents")


def _in_background(work: Callable[[], T]) -> T:
    """Wait for native code in a thread: run in the main one it would not see Ctrl-C before its end."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # raised again where the result is waited for
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def _report(trained: "Tokenizer", sample: "Sample") -> None:
    """Sources down: bytes read, and bytes per token of a part of them, beside GPT-2 where its figure is known."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from looplm.data.bpe import compression
    from looplm.data.documents import HUB

    table = Table(title="bytes per token", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in ("bytes read", "measured", "tokens", "bytes/token", "GPT-2"):
        table.add_column(name, justify="right")
    for source in sample.sources:
        found = compression(trained, source.measured)
        gpt2 = GPT2_BYTES_PER_TOKEN.get(source.name.removeprefix(HUB).split(",")[0])
        table.add_row(
            escape(source.name),
            f"{source.n_bytes:,}",
            f"{found.n_bytes:,}{'' if source.is_held_out else ' *'}",
            f"{found.n_tokens:,}",
            f"{found.bytes_per_token:.2f}" if found.n_tokens else "-",
            "-" if gpt2 is None else f"{gpt2:.2f}",
        )
    console = Console()
    console.print(table)
    if not all(source.is_held_out for source in sample.sources):
        console.print("[dim]* learned from too: the source is too small to hold text out[/dim]")
