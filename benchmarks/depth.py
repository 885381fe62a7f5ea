"""Depth saved as time saved, ratios in one run.

python benchmarks/depth.py {s3,reasoning,speculation} --json out.json [--plot out.png] [--run RUN] [--threads 2]

s3: the loop staircase's model (RUN, else trained here in 4 minutes). An exit rule is calibrated on 1,000 sequences,
then scored on 1,000 others of length 48 against full depth (2n loops); then a queue of sequences of mixed lengths is
run with the rule, by continuous depth batching, and at fixed depth, alternating.

reasoning: a reasoner with a dial (RUN, else builtin:reasoner-deep). Accuracy from half its trained depth to four times
that, and with the exit rule that `looplm calibrate RUN` stored; wall time per answer with the rule and at full depth,
alternating, one question at a time and 16 at a time, where a waiting question takes the row of an answered one; and in
groups of 16 that wait for the longest answer.

speculation: the same reasoner, one question at a time: tokens per second plain and drafted with fewer loops,
alternating, and whether the text is the same. Both reasoner parts are timed as `looplm generate` decodes, on one
thread, plain and compiled.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from looplm.checkpoint import load, run_folder
from looplm.data.tasks.permutations import BOS_ID, N_ANSWERS, products
from looplm.data.tokenizer import EOS_ID
from looplm.eval.exits import CALIBRATION_SEED, GRIDS, SequenceTrials, as_record, calibrate, load_exit
from looplm.eval.reasoning import FORMAT_TASK, Result, evaluate, held_out_questions, load_reasoner
from looplm.infer.decoders import EarlyExit
from looplm.infer.depth import score_sequences
from looplm.infer.engine import generate
from looplm.infer.exits import KINDS, ExitRule
from looplm.infer.reasoner import MAX_NEW_TOKENS, Reasoner
from looplm.infer.speculate import Draft, speculate
from looplm.model.looped import LoopedLM
from looplm.train.run import resolve_run, start_run

MAX_LOSS, CONFIDENCE, LENGTH = 0.005, 0.95, 48
BATCH, N_QUEUE, N_REPEATS, N_REPEATS_TEXT = 64, 512, 5, 3
DEEP, N_PER_TASK = "builtin:reasoner-deep", 150
QUEUE_LENGTHS = (8, 48)


def s3(run: Path | None) -> dict[str, Any]:
    """See the module's first lines."""
    if run is None:
        run = Path(tempfile.mkdtemp()) / "s3"
        start_run(resolve_run("s3"), run)
    model = load(run)
    on_length = {"lengths": [LENGTH], "loops": "2n"}
    trials = SequenceTrials(model, **on_length, n_sequences=1000, seed=CALIBRATION_SEED)
    tried, best = calibrate(trials, kind="latent", max_loss=MAX_LOSS, confidence=CONFIDENCE)
    fresh = SequenceTrials(model, **on_length, n_sequences=1000, seed=CALIBRATION_SEED + 1)
    scored = fresh.run(best.rule)
    print(
        f"length {LENGTH}, {best.rule}: {100 * scored.exact.accuracy:.1f} % exact of {scored.exact.n} (full depth "
        f"{100 * scored.full.accuracy:.1f}), {scored.mean_loops:.1f} of {scored.full_loops:.0f} loops: "
        f"{100 * scored.saved:.0f} % fewer"
    )
    untrained = [kind for kind in KINDS if kind != "gate"]
    curves = {kind: [fresh.run(ExitRule(kind, threshold)) for threshold in GRIDS[kind]] for kind in untrained}
    return {
        "calibration": [as_record(trial, confidence=CONFIDENCE) for trial in tried],
        "length_48": {**as_record(scored, confidence=CONFIDENCE), "saved": scored.saved},
        "curves": {kind: [as_record(each, confidence=CONFIDENCE) for each in curve] for kind, curve in curves.items()},
        "queue": queue(model, best.rule),
    }


def reasoning(run: Path | None) -> dict[str, Any]:
    """See the module's first lines."""
    reasoner, early = load_reasoner(run or DEEP), load_exit(run_folder(run or DEEP))
    trained = reasoner.model.config.n_loops
    questions = held_out_questions(N_PER_TASK)
    dial: dict[int, Any] = {}
    for n_loops in sorted({round(share * trained) for share in (0.5, 1, 1.5, 2, 3, 4)}):
        dial[n_loops] = accuracies(evaluate(reasoner, questions, n_loops=n_loops))
        print(f"{n_loops} loops: {dial[n_loops]['mean']:.2f} % of {len(questions)}", dial[n_loops]["tasks"])
    worst = min(dial[n_loops]["mean"] for n_loops in dial if n_loops > trained) - dial[trained]["mean"]
    print(f"from {trained} to {4 * trained} loops accuracy moves by {worst:+.2f} points at worst")
    stopped = evaluate(reasoner, questions, early=early)
    print(f"{early}: {accuracies(stopped)['mean']:.2f} %, {stopped.mean_loops:.2f} of {trained} loops")
    torch.set_num_threads(1)
    timed: dict[str, Any] = {}
    for compiled in (False, True):
        if compiled:
            reasoner.model.compile_decoding()
        for batch_size in (1, 16):
            asked = [each.question for each in held_out_questions(8 if batch_size == 1 else 16, seed=7)]
            random.Random(7).shuffle(asked)
            ways = {
                "full": answering(reasoner, asked, batch_size=batch_size),
                "early": answering(reasoner, asked, batch_size=batch_size, early=early),
            }
            if batch_size > 1:
                ways["full, in groups"] = in_groups(reasoner, asked, batch_size=batch_size)
                ways["early, in groups"] = in_groups(reasoner, asked, batch_size=batch_size, early=early)
            seconds, _ = alternate(ways, n_repeats=N_REPEATS_TEXT)
            ratio = statistics.median(seconds["early"]) / statistics.median(seconds["full"])
            name = f"batch {batch_size}, {'compiled' if compiled else 'plain'}"
            per_answer = {way: 1000 * statistics.median(each) / len(asked) for way, each in seconds.items()}
            timed[name] = {"ms_per_answer": per_answer, "less_wall_time": 1 - ratio}
            full, stopping = per_answer["full"], per_answer["early"]
            print(f"{name}: {full:.1f} ms an answer, {stopping:.1f} with exits, {1 - ratio:.0%} less")
            for way in [way for way in ways if "groups" in way]:
                print(f"{name}, {way}: {per_answer[way]:.1f} ms")
    return {
        "trained": trained,
        "dial": dial,
        "worst_change": worst,
        "exit": {"rule": str(early), "mean_loops": stopped.mean_loops, **accuracies(stopped)},
        "seconds": timed,
    }


def speculation(run: Path | None) -> dict[str, Any]:
    """See the module's first lines."""
    torch.set_num_threads(1)
    reasoner = load_reasoner(run or DEEP)
    model, result = reasoner.model, {}
    prompts = [reasoner.prompt_ids(each.question) for each in held_out_questions(8, seed=7)]
    common: dict[str, Any] = {"eos_id": EOS_ID, "max_new_tokens": MAX_NEW_TOKENS}
    for compiled in (False, True):
        if compiled:
            model.compile_decoding()
        drafts = [Draft(1, 4), Draft(1, 8), Draft(1, 12), Draft(1, 16), Draft(2, 8)]
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: [generate(model, [prompt], **common)[0] for prompt in prompts]
        }
        for draft in drafts:
            ways[str(draft)] = lambda draft=draft: speculate(model, prompts, draft=draft, **common)
        seconds, texts = alternate(ways, n_repeats=N_REPEATS_TEXT)
        n_tokens = sum(len(each.ids) for each in texts["plain"])
        for way in ways:
            rate = n_tokens / statistics.median(seconds[way])
            speedup = statistics.median(seconds["plain"]) / statistics.median(seconds[way])
            told = texts[way]
            same = way == "plain" or [each.generation for each in told] == texts["plain"]
            accepted = None if way == "plain" else sum(t.n_accepted for t in told) / sum(t.n_drafted for t in told)
            name = f"{'compiled' if compiled else 'eager'}, {way}"
            result[name] = {"tokens_per_second": rate, "speedup": speedup, "same": same, "accepted": accepted}
            print(f"{name}: {rate:,.0f} tokens/s, {speedup:.2f} times, the same text: {same}, accepted: {accepted}")
    return {"n_texts": len(prompts), "ways": result}


def accuracies(result: Result) -> dict[str, Any]:
    """Right answers in percent, of all questions and by task."""
    tasks = {task: 100 * each.accuracy for task, each in result.scores.items() if task != FORMAT_TASK}
    return {"mean": 100 * result.mean_accuracy, "n": len(result.right), "tasks": tasks}


def answering(
    reasoner: Reasoner, asked: list[str], *, batch_size: int, early: EarlyExit | None = None
) -> Callable[[], Any]:
    """What answers all questions, `batch_size` at a time, each that is answered making room for the next."""
    return lambda: reasoner.answer(asked, early=early, batch_size=batch_size)


def in_groups(
    reasoner: Reasoner, asked: list[str], *, batch_size: int, early: EarlyExit | None = None
) -> Callable[[], Any]:
    """What answers all questions in groups of `batch_size`, one after another."""
    parts = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    return lambda: [reasoner.answer(part, early=early) for part in parts]


def alternate(ways: dict[str, Callable[[], Any]], *, n_repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of `n_repeats` runs of each way in turns, after one that warms up, and what each gave last."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for repeat in range(n_repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            given[name] = way()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds, given


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against loops, a curve for each rule, the calibrated threshold marked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for kind, trials in result["curves"].items():
        points = sorted((each["mean_loops"], 100 * each["exact"]["accuracy"]) for each in trials)
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    chosen = result["length_48"]
    label = f"calibrated: {chosen['rule']}"
    axes.plot(chosen["mean_loops"], 100 * chosen["exact"]["accuracy"], "k*", markersize=12, label=label)
    axes.axvline(chosen["full_loops"], color="grey", linestyle=":", label="full depth")
    axes.set(xlabel="loops per token, mean", ylabel=f"sequences of length {LENGTH} all right, %", ylim=(-3, 103))
    axes.legend()
    figure.savefig(path, dpi=120)


def queue(model: LoopedLM, rule: ExitRule) -> dict[str, Any]:
    """Sequences of mixed lengths: with the rule, at the depth of the longest, and each batch of like lengths at the
    depth of its longest, which nobody knows beforehand of text."""
    rng = random.Random(7)
    lengths = [rng.randint(*QUEUE_LENGTHS) for _ in range(N_QUEUE)]
    ids = [torch.tensor([BOS_ID] + [rng.randint(1, N_ANSWERS) for _ in range(length)]) for length in lengths]
    fixed = 2 * QUEUE_LENGTHS[1]

    def with_rule() -> list[Tensor]:
        return [each.logits for each in score_sequences(model, ids, n_loops=fixed, rule=rule, batch_size=BATCH)]

    def at_fixed_depth() -> list[Tensor]:
        return batches(model, ids, list(range(N_QUEUE)), lambda longest: fixed)

    def sorted_by_length() -> list[Tensor]:
        return batches(model, ids, sorted(range(N_QUEUE), key=lambda n: lengths[n]), lambda longest: 2 * longest)

    ways: dict[str, Callable[[], list[Tensor]]] = {
        "rule": with_rule,
        "fixed": at_fixed_depth,
        "sorted, depth by length": sorted_by_length,
    }
    seconds, logits = alternate(ways, n_repeats=N_REPEATS)
    answers = {name: [each[1:].argmax(-1) for each in found] for name, found in logits.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    right = {name: sum(is_right(i, a) for i, a in zip(ids, found, strict=True)) for name, found in answers.items()}
    ratio = {name: median[name] / median["rule"] for name in ways if name != "rule"}
    for name in ways:
        print(f"queue of {N_QUEUE}, {name}: {median[name]:.2f} s, {right[name]} exact")
    print(", ".join(f"{value:.2f} times faster than {name}" for name, value in ratio.items()))
    return {"seconds": seconds, "exact": right, "n": N_QUEUE, "speedup": ratio, "batch_size": BATCH}


def batches(model: LoopedLM, ids: list[Tensor], order: list[int], depth: Callable[[int], int]) -> list[Tensor]:
    """Logits of all sequences, BATCH at a time in the given order, padded on the right, in their own order."""
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        padded = pad_sequence([ids[number] for number in numbers], batch_first=True)
        with torch.inference_mode():
            logits = model(padded, n_loops=depth(padded.shape[1] - 1)).logits
        for row, number in enumerate(numbers):
            found[number] = logits[row, : len(ids[number])]
    return [found[number] for number in range(len(ids))]


def is_right(ids: Tensor, answers: Tensor) -> bool:
    """Whether every prefix's product is right."""
    return bool((products(ids[None, 1:].numpy() - 1)[0] == answers.numpy()).all())


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"s3": s3, "reasoning": reasoning, "speculation": speculation}
    parser.add_argument("what", choices=parts)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw accuracy against loops here, a PNG")
    parser.add_argument("--run", type=Path, help="a run of `looplm train s3` or `looplm train reason-deep`")
    parser.add_argument("--threads", type=int, default=2, help="of all that is not decoded text")
    given = parser.parse_args()
    if given.run is not None and not given.run.is_dir():
        sys.exit(f"--run {str(given.run)!r} is not a folder; make one with `looplm train s3 --out {given.run}`")
    if given.plot is not None and given.what != "s3":
        sys.exit("--plot draws the s3 part")
    torch.set_num_threads(given.threads)
    result = {"what": given.what, "threads": given.threads, "torch": torch.__version__, **parts[given.what](given.run)}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.plot is not None:
        plot(result, given.plot)


if __name__ == "__main__":
    main()
