"""Depth saved as time saved, ratios in one run.

python benchmarks/depth.py s3 --json out.json [--plot out.png] [--run RUN] [--threads 2]

s3: the loop staircase's model (RUN, else trained here in 4 minutes). An exit rule is calibrated on 1,000 sequences,
then scored on 1,000 others of length 48 against full depth (2n loops); then a queue of sequences of mixed lengths is
run with the rule, by continuous depth batching, and at fixed depth, alternating.
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

from looplm.checkpoint import load
from looplm.data.tasks.permutations import BOS_ID, N_ANSWERS, products
from looplm.eval.exits import CALIBRATION_SEED, GRIDS, SequenceTrials, as_record, calibrate
from looplm.infer.depth import score_sequences
from looplm.infer.exits import KINDS, ExitRule
from looplm.model.looped import LoopedLM
from looplm.train.run import resolve_run, start_run

MAX_LOSS, CONFIDENCE, LENGTH = 0.005, 0.95, 48
BATCH, N_QUEUE, N_REPEATS = 64, 512, 5
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
    curves = {kind: [fresh.run(ExitRule(kind, threshold)) for threshold in GRIDS[kind]] for kind in KINDS}
    return {
        "calibration": [as_record(trial, confidence=CONFIDENCE) for trial in tried],
        "length_48": {**as_record(scored, confidence=CONFIDENCE), "saved": scored.saved},
        "curves": {kind: [as_record(trial, confidence=CONFIDENCE) for trial in curves[kind]] for kind in KINDS},
        "queue": queue(model, best.rule),
    }


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
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[Tensor]] = {}
    for repeat in range(N_REPEATS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            logits = way()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            answers[name] = [each[1:].argmax(-1) for each in logits]
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
    parser.add_argument("what", choices=["s3"])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw accuracy against loops here, a PNG")
    parser.add_argument("--run", type=Path, help="a run of `looplm train s3`; default: train one")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.run is not None and not given.run.is_dir():
        sys.exit(f"--run {str(given.run)!r} is not a folder; make one with `looplm train s3 --out {given.run}`")
    torch.set_num_threads(given.threads)
    result = {"what": given.what, "threads": given.threads, "torch": torch.__version__, **s3(given.run)}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.plot is not None:
        plot(result, given.plot)


if __name__ == "__main__":
    main()
