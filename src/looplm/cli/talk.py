"""`looplm chat` and `looplm generate`."""

from typing import Annotated, Any

import typer

RunArgument = Annotated[str, typer.Argument(help="A run folder, or builtin:reasoner.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", show_default=False)]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely, relative to the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1 makes repeated tokens less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
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
    typer.Option(help="With --exit: keys of the loops left out, recompute or last.", show_default="recompute"),
]
DraftLoops = Annotated[
    int | None,
    typer.Option(
        "--draft",
        help="Guess ahead with this many loops, check at full depth: the same text, sooner.",
        show_default=False,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Wait up to a minute once, then write twice as fast or more.")]


def chat(
    run: RunArgument = "builtin:reasoner",
    loops: Annotated[int | None, typer.Option(help="Loops to start with.", show_default=False)] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    exit_rule: Exit = None,
    missing: Missing = None,
    draft: DraftLoops = None,
    compiled: Compile = False,
) -> None:
    """Ask questions in the terminal. Steps are shown dimmed, the answer plain; /loops N turns the dial."""
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
    run_chat(run, n_loops=loops, sampling=sampling, compiled=compiled, **depth)


def generate(
    run: RunArgument,
    prompt: Annotated[
        list[str], typer.Option(help="A question, or the beginning of a text; repeat the option for a batch.")
    ],
    loops: Annotated[int | None, typer.Option(help="Passes through the core.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 320,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Most prompts at a time; the others take the places of those that end.", show_default="all"),
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
    compiled: Compile = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
) -> None:
    """Answer prompts, or go on with them where the run was trained on plain text."""
    import json
    import time

    import torch

    from looplm.checkpoint import load_run
    from looplm.eval.loops import TEXT_KINDS
    from looplm.eval.reasoning import as_reasoner
    from looplm.eval.text import as_completer

    sampling = _sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    depth = _depth(run, exit_rule=exit_rule, missing=missing, draft=draft)
    torch.set_num_threads(1)  # a model this small decodes no faster on two, and far slower on two busy ones
    loaded = load_run(run)
    is_text = loaded.config.get("data", {}).get("kind") in TEXT_KINDS
    answer: Any = as_completer(loaded, run=run).complete if is_text else as_reasoner(loaded, run=run).answer
    if compiled:
        loaded.model.compile_decoding(n_rows=min(len(prompt), batch_size or len(prompt)))
        typer.secho("Compiling while the first token is written: ten seconds to a minute.", dim=True, err=True)
    started = time.perf_counter()
    options = {"n_loops": loops, "max_new_tokens": max_new_tokens, "sampling": sampling, "batch_size": batch_size}
    replies = answer(prompt, **options, **depth)
    seconds = time.perf_counter() - started
    for asked, reply in zip(prompt, replies, strict=True):
        if json_out:
            record = {"prompt": asked, **({} if is_text else _answered(reply)), "text": reply.text}
            record |= {
                "n_loops": loops or loaded.model.config.n_loops,
                "mean_loops": round(sum(reply.generation.depths) / len(reply.generation.depths), 3),
                "n_tokens": len(reply.generation.ids),
                "stopped_by": reply.generation.stopped_by,
                "seconds": round(seconds, 4),
            }
            typer.echo(json.dumps(record))
        elif is_text:
            typer.secho(asked, dim=True, nl=False)
            typer.echo(reply.text)
        else:
            for step in reply.completion.steps:
                typer.secho(f"  {step}", dim=True)
            typer.echo(reply.completion.answer if reply.completion.answer is not None else reply.text)


def _answered(reply: Any) -> dict[str, Any]:
    """What is told of an answer."""
    completion = reply.completion
    return {"answer": completion.answer, "steps": list(completion.steps), "well_formed": completion.well_formed}


def _depth(run: str, *, exit_rule: str | None, missing: str | None, draft: int | None) -> dict[str, Any]:
    """The options about loops, as `Reasoner.answer` takes them."""
    from looplm.cli.arguments import early_exit
    from looplm.errors import ConfigError
    from looplm.infer.speculate import Draft

    if missing is not None and exit_rule is None:
        raise ConfigError("--missing says what --exit leaves out; give --exit too")
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
