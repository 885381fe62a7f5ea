"""The terminal chat: the model's steps appear as it writes them."""

import io
import sys
from typing import Any, TextIO

import torch
import typer

from looplm.checkpoint import load_run
from looplm.data.tokenizer import SPECIAL
from looplm.errors import CheckpointError, LooplmError
from looplm.eval.loops import TEXT_KINDS
from looplm.eval.reasoning import as_reasoner
from looplm.infer.decoders import EarlyExit
from looplm.infer.reasoner import MAX_NEW_TOKENS, Reasoner
from looplm.infer.sampling import SamplingConfig
from looplm.infer.speculate import Draft
from looplm.model.cache_memory import check_cache_fits
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

HELP = """Ask for sums, comparisons, patterns, sorted lists or short word problems, for example:
  What is 47 + 85?
  Which is larger, 3141 or 3151?
  What comes next: 3, 6, 12, 24, ?
  Sort in ascending order: 512 87 300 45
  Tom has 12 apples. He buys 7 more. How many apples does Tom have?
Commands: /loops N (how often the core runs per token), /help, /quit"""
MAX_DIGITS = 1000  # of a number; Python reads none of thousands


class StepPrinter:
    """Writes a completion token by token: steps dimmed, one a line; the answer plain. A letter is written once all its
    bytes have come; `finish` writes what is left of one that never ends."""

    def __init__(self, reasoner: Reasoner) -> None:
        self.reasoner = reasoner
        self.is_thinking = True
        self.pending: list[int] = []  # tokens since the last one that ended with a whole letter
        self.n_written = 0  # of their letters

    def __call__(self, row: int, token: int) -> None:
        tag = self.reasoner.tokenizer.id_to_token(token)
        if tag not in SPECIAL:
            self.pending.append(token)
            self._write(is_over=False)
            return
        self.finish()
        if tag == "<STEP>":
            typer.secho("\n  ", dim=True, nl=False)
        elif tag == "<ANS>":
            self.is_thinking = False
            typer.echo("\n", nl=False)

    def finish(self) -> None:
        """Write what is left."""
        self._write(is_over=True)

    def _write(self, *, is_over: bool) -> None:
        text = self.reasoner.tokenizer.decode(self.pending, skip_special_tokens=False)
        is_cut = text.endswith("\ufffd") and not is_over  # bytes of a letter decode as this until the last has come
        piece = text[self.n_written : len(text) - is_cut]
        self.n_written += len(piece)
        if not is_cut:
            self.pending, self.n_written = [], 0
        if piece:
            typer.secho(piece, dim=True, nl=False) if self.is_thinking else typer.echo(piece, nl=False)


def run_chat(
    run: str,
    *,
    n_loops: int | None,
    sampling: SamplingConfig,
    early: EarlyExit | None = None,
    draft: Draft | None = None,
    compiled: bool = False,
    device: str = "cpu",
    dtype: str = "fp32",
) -> None:
    """Read questions until the end of input, /quit or Ctrl-C."""
    torch.set_num_threads(1)
    reasoner = _load(run, device=device, dtype=dtype)
    if compiled:
        reasoner.model.compile_decoding()
        note = "The first answer waits ten seconds or more for the compiler, and the first after each /loops."
        typer.secho(note, dim=True, err=True)
    loops = _checked(reasoner.model, n_loops if n_loops is not None else reasoner.model.config.n_loops)
    parameters = sum(parameter.numel() for parameter in reasoner.model.parameters())
    if _is_terminal(sys.stdin):
        typer.secho(f"{run}: {parameters:,} parameters, {loops} loops per token. /help for what to ask.", dim=True)
    _accept_any_bytes(sys.stdin)
    while True:
        try:
            line = _next_line()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not line:
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            if line == "/help":
                typer.echo(HELP)
            elif line.split()[0] == "/loops":
                loops = _loops(line, loops, model=reasoner.model)
            elif line.startswith("/"):
                typer.echo(f"unknown command {line.split()[0]!r}; there is /loops N, /help and /quit")
            else:
                _answer(reasoner, line, n_loops=loops, sampling=sampling, early=early, draft=draft)
        except LooplmError as error:
            typer.secho(f"error: {error}", fg="red")
        except KeyboardInterrupt:
            typer.echo("\n(stopped)")


def _load(run: str, *, device: str, dtype: str) -> Reasoner:
    loaded = load_run(run, device=device, dtype=dtype)
    if loaded.config.get("data", {}).get("kind") in TEXT_KINDS:
        raise CheckpointError(
            f"{run!r} was trained on text, which has no questions to chat about; continue a text with "
            f"`looplm generate {run} --prompt TEXT`"
        )
    return as_reasoner(loaded, run=run)


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; a closed one is None."""
    return stream is not None and stream.isatty()


def _accept_any_bytes(stdin: TextIO | None) -> None:
    """Let a line that is not UTF-8 come through with its bytes marked, so that it alone is refused. A pipe or a file is
    UTF-8 in any locale, with a byte order mark or without."""
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding=None if stdin.isatty() else "utf-8-sig", errors="surrogateescape")


def _next_line() -> str:
    """What is typed or piped next, without the white space around it.

    Raises:
        EOFError: there is no more.
    """
    if _is_terminal(sys.stdin) and sys.stdout is not None:
        return input("> ").strip()
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _loops(line: str, current: int, *, model: LoopedLM) -> int:
    words = line.split()
    if len(words) == 2 and words[1].isdecimal() and len(words[1]) < MAX_DIGITS and int(words[1]) > 0:
        current = _checked(model, int(words[1]))
        typer.secho(f"{current} loop{'s' if current > 1 else ''} per token", dim=True)
    else:
        typer.echo(f"/loops takes a whole number of at least 1, for example /loops 4; it is {current}")
    return current


def _checked(model: LoopedLM, n_loops: int) -> int:
    """The number of loops; one that could answer no question is refused."""
    capacity = min(MAX_NEW_TOKENS, model.config.seq_len)
    check_cache_fits(model, batch_size=1, capacity=capacity, n_loops=LoopPlan(n_loops).n_loops)
    return n_loops


def _answer(reasoner: Reasoner, question: str, **options: Any) -> None:
    """Write the answer as it comes; `options` are those of `Reasoner.answer`."""
    printer = StepPrinter(reasoner)
    try:
        reply = reasoner.answer([question], on_token=printer, **options)[0]
    finally:
        printer.finish()
    typer.echo("")
    if options["early"] is not None:
        depths = reply.generation.depths
        typer.secho(f"({sum(depths) / len(depths):.2f} of {options['n_loops']} loops per token)", dim=True)
    if not reply.completion.well_formed:
        typer.secho(f"(not a complete solution; stopped by {reply.generation.stopped_by})", dim=True)
