"""The terminal chat: the model's steps appear as it writes them."""

import sys
from typing import Any

import torch
import typer

from looplm.cli.arguments import open_run
from looplm.data.tokenizer import EOS
from looplm.errors import LooplmError
from looplm.eval.reasoning import as_reasoner
from looplm.infer.decoders import EarlyExit
from looplm.infer.reasoner import Reasoner
from looplm.infer.sampling import SamplingConfig
from looplm.infer.speculate import Draft
from looplm.model.loop.plan import LoopPlan

HELP = """Ask for sums, comparisons, patterns, sorted lists or short word problems, for example:
  What is 47 + 85?
  Which is larger, 3141 or 3151?
  What comes next: 3, 6, 12, 24, ?
  Sort in ascending order: 512 87 300 45
  Tom has 12 apples. He buys 7 more. How many apples does Tom have?
Commands: /loops N (how often the core runs per token), /help, /quit"""


class StepPrinter:
    """Writes a completion token by token: steps dimmed, one a line; the answer plain."""

    def __init__(self, reasoner: Reasoner) -> None:
        self.reasoner = reasoner
        self.is_thinking = True

    def __call__(self, row: int, token: int) -> None:
        piece = self.reasoner.tokenizer.decode([token], skip_special_tokens=False)
        if piece == "<STEP>":
            typer.secho("\n  ", dim=True, nl=False)
        elif piece == "<ANS>":
            self.is_thinking = False
            typer.echo("\n", nl=False)
        elif piece not in ("<THINK>", "</THINK>", "</ANS>", EOS):
            typer.secho(piece, dim=True, nl=False) if self.is_thinking else typer.echo(piece, nl=False)
        sys.stdout.flush()


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
    reasoner = as_reasoner(open_run(run, device=device, dtype=dtype), run=run)
    if compiled:
        reasoner.model.compile_decoding()
        note = "The first answer waits ten seconds or more for the compiler, and the first after each /loops."
        typer.secho(note, dim=True, err=True)
    loops = LoopPlan(n_loops if n_loops is not None else reasoner.model.config.n_loops).n_loops
    parameters = sum(parameter.numel() for parameter in reasoner.model.parameters())
    if sys.stdin.isatty():
        typer.secho(f"{run}: {parameters:,} parameters, {loops} loops per token. /help for what to ask.", dim=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
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
                loops = _loops(line, loops)
            elif line.startswith("/"):
                typer.echo(f"unknown command {line.split()[0]!r}; there is /loops N, /help and /quit")
            else:
                _answer(reasoner, line, n_loops=loops, sampling=sampling, early=early, draft=draft)
        except LooplmError as error:
            typer.secho(f"error: {error}", fg="red")
        except KeyboardInterrupt:
            typer.echo("\n(stopped)")


def _loops(line: str, current: int) -> int:
    words = line.split()
    if len(words) == 2 and words[1].isdecimal() and int(words[1]) > 0:
        current = int(words[1])
        typer.secho(f"{current} loop{'s' if current > 1 else ''} per token", dim=True)
    else:
        typer.echo(f"/loops takes a whole number of at least 1, for example /loops 4; it is {current}")
    return current


def _answer(reasoner: Reasoner, question: str, **options: Any) -> None:
    """Write the answer as it comes; `options` are those of `Reasoner.answer`."""
    reply = reasoner.answer([question], on_token=StepPrinter(reasoner), **options)[0]
    typer.echo("")
    if options["early"] is not None:
        depths = reply.generation.depths
        typer.secho(f"({sum(depths) / len(depths):.2f} of {options['n_loops']} loops per token)", dim=True)
    if not reply.completion.well_formed:
        typer.secho(f"(not a complete solution; stopped by {reply.generation.stopped_by})", dim=True)
