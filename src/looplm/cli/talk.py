"""`looplm chat` and `looplm generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from looplm.cli.arguments import Device, DType, JsonSwitch, count_option, refuse_file_for_json

RunArgument = Annotated[str, typer.Argument(help="A run folder, or builtin:reasoner.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, count_option("--top-k", help="Keep the k likeliest tokens.", show_default=False)]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely, relative to the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1 makes repeated tokens less likely.")]
Seed = Annotated[int, count_option("--seed", help="Seed of the draws.", least=0)]
Exit = Annotated[
    str | None,
    typer.Option(
        "--exit",
        help="Stop each token's loops by a rule, as latent:0.05, or by the `calibrated` one of the run.",
        show_default=False,
    ),
]
Missing = Annotated[
    str | None,
    typer.Option(help="With --exit: the keys of skipped loops, recompute or last.", show_default="recompute"),
]
DraftLoops = Annotated[
    int | None,
    count_option(
        "--draft",
        help="Guess ahead with this many loops, check at full depth: the same text, sooner.",
        show_default=False,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Wait up to a minute once, then write twice as fast or more.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        help="A question, or the beginning of a text; repeat the option for a batch. - reads a prompt a line from "
        "standard input.",
        show_default=False,
    ),
]
# A separate option instead of --prompt @FILE, since a prompt may begin with any character.
PromptFile = Annotated[
    Path | None, typer.Option(help="A file with a prompt a line; blank lines are skipped.", show_default=False)
]


def chat(
    run: RunArgument = "builtin:reasoner",
    loops: Annotated[int | None, count_option("--loops", help="Loops to start with.", show_default=False)] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    exit_rule: Exit = None,
    missing: Missing = None,
    draft: DraftLoops = None,
    device: Device = "cpu",
    dtype: DType = "fp32",
    compiled: Compile = False,
) -> None:
    """Ask questions in the terminal. Steps are shown dimmed, the answer plain; /loops N turns the dial.

    Examples:

        looplm chat
        looplm chat runs/r --loops 4
        looplm chat runs/r --temperature 0.7 --top-p 0.9 --seed 1
    """
    from looplm.cli.chat import run_chat

    sampling = _sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    depth = _depth(run, exit_rule=exit_rule, missing=missing, draft=draft)
    run_chat(run, n_loops=loops, sampling=sampling, compiled=compiled, device=device, dtype=dtype, **depth)


def generate(
    ctx: typer.Context,
    run: RunArgument,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    loops: Annotated[int | None, count_option("--loops", help="Passes through the core.", show_default=False)] = None,
    max_new_tokens: Annotated[int, count_option("--max-new-tokens", help="Longest completion.")] = 320,
    batch_size: Annotated[
        int | None,
        count_option(
            "--batch-size",
            help="Most prompts at a time; a waiting prompt starts when another one ends.",
            show_default="as many as 600 MB hold",
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    exit_rule: Exit = None,
    missing: Missing = None,
    draft: DraftLoops = None,
    device: Device = "cpu",
    dtype: DType = "fp32",
    compiled: Compile = False,
    json_out: JsonSwitch = False,
) -> None:
    """Answer prompts, or continue them where the run was trained on plain text.

    Examples:

        looplm generate builtin:reasoner --prompt "What is 47 + 85?"
        looplm generate builtin:reasoner --prompt - --json < questions.txt
        looplm generate runs/text --prompt "Once" --temperature 0.8 --seed 1
    """
    import time

    import torch

    from looplm.checkpoint import load_run
    from looplm.eval.loops import TEXT_KINDS
    from looplm.eval.reasoning import as_reasoner
    from looplm.eval.text import as_completer

    refuse_file_for_json(ctx.args, json_out=json_out)
    sampling = _sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    depth = _depth(run, exit_rule=exit_rule, missing=missing, draft=draft)
    asked = _prompts(prompt or [], prompts)
    torch.set_num_threads(1)  # a model this small decodes no faster on two, and far slower on two busy ones
    loaded = load_run(run, device=device, dtype=dtype)
    is_text = loaded.config.get("data", {}).get("kind") in TEXT_KINDS
    answer: Any = as_completer(loaded, run=run).complete if is_text else as_reasoner(loaded, run=run).answer
    n_loops = loops or loaded.model.config.n_loops
    if batch_size is None and draft is None:
        batch_size = _rows_that_fit(loaded.model, asked, n_loops=n_loops, max_new_tokens=max_new_tokens)
    if compiled:
        loaded.model.compile_decoding(n_rows=min(len(asked), batch_size or len(asked)))
        typer.secho("Compiling while the first token is written: ten seconds to a minute.", dim=True, err=True)
    started = time.perf_counter()
    options = {"n_loops": loops, "max_new_tokens": max_new_tokens, "sampling": sampling, "batch_size": batch_size}
    replies = answer(asked, **options, **depth)
    seconds = time.perf_counter() - started
    for text, reply in zip(asked, replies, strict=True):
        if json_out:
            _print_record(text, reply, is_text=is_text, n_loops=n_loops, seconds=seconds)
        else:
            _print_reply(text, reply, is_text=is_text)


def _print_reply(prompt: str, reply: Any, *, is_text: bool) -> None:
    """A text behind its prompt, or an answer below its steps; what is not the result is dimmed."""
    if is_text:
        typer.secho(prompt, dim=True, nl=False)
        typer.echo(reply.text)
        return
    for step in reply.completion.steps:
        typer.secho(f"  {step}", dim=True)
    typer.echo(reply.completion.answer if reply.completion.answer is not None else reply.text)


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """All prompts: of --prompt (of standard input where that is `-`), then of --prompts."""
    import sys

    from looplm.errors import DataError
    from looplm.eval.lines import STDIN, numbered_lines

    if list(given).count(STDIN) + (str(file) == STDIN) > 1:
        raise DataError("standard input can be read once; give - once")
    found: list[str] = []
    for prompt in given:
        if prompt == STDIN and sys.stdin.isatty():
            typer.secho("Type a prompt a line, then Ctrl-D on an empty line.", dim=True, err=True)
        found += [text for _, text in numbered_lines(STDIN)] if prompt == STDIN else [prompt]
    if file is not None:
        found += [text for _, text in numbered_lines(file, what="file of prompts")]
    if not found:
        if not given and file is None:
            raise DataError("no prompt given; add --prompt TEXT, --prompts FILE, or --prompt - for standard input")
        raise DataError(f"{'standard input' if file is None else file} holds no prompt; give one a line")
    return found


def _rows_that_fit(model: Any, prompts: Sequence[str], *, n_loops: int, max_new_tokens: int) -> int | None:
    """The most prompts at a time that memory is meant for; None where that is all of them."""
    from looplm.eval.reasoning import rows_that_fit

    longest = max(len(prompt.encode(errors="replace")) for prompt in prompts)  # bytes: as many tokens at most
    n_rows = rows_that_fit(model, n_loops=n_loops, n_tokens=longest + max_new_tokens)
    return n_rows if n_rows < len(prompts) else None


def _print_record(prompt: str, reply: Any, *, is_text: bool, n_loops: int, seconds: float) -> None:
    """One JSON object a line."""
    import json

    record: dict[str, Any] = {"prompt": prompt}
    if not is_text:
        completion = reply.completion
        record |= {"answer": completion.answer, "steps": completion.steps, "well_formed": completion.well_formed}
    generation = reply.generation
    record |= {
        "text": reply.text,
        "n_loops": n_loops,
        "mean_loops": round(sum(generation.depths) / len(generation.depths), 3),
        "n_tokens": len(generation.ids),
        "stopped_by": generation.stopped_by,
        "seconds": round(seconds, 4),
    }
    typer.echo(json.dumps(record))


def _depth(run: str, *, exit_rule: str | None, missing: str | None, draft: int | None) -> dict[str, Any]:
    """The options about loops, as `Reasoner.answer` takes them."""
    from looplm.cli.arguments import early_exit
    from looplm.errors import ConfigError
    from looplm.infer.speculate import Draft

    if missing is not None and exit_rule is None:
        raise ConfigError("--missing belongs to --exit; give --exit too")
    if draft is not None and exit_rule is not None:
        raise ConfigError("--draft checks every token at full depth and --exit leaves loops out; give one of them")
    return {
        "early": None if exit_rule is None else early_exit(exit_rule, run=run, missing=missing),
        "draft": None if draft is None else Draft(draft),
    }


def _sampling(**values: Any) -> Any:
    from looplm.config import parse
    from looplm.infer.sampling import SamplingConfig

    return parse(SamplingConfig, values, source="sampling options")
