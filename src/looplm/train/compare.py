"""A looped model against its baselines: the same data, tuned rates, several seeds, one report.

Each arm has its own rate, chosen among RATES by held-out loss after a quarter of the steps:

looped           the recipe as it is.
iso-parameter    the same model run once, as many steps: the same parameters and tokens, fewer FLOPs.
iso-FLOP         separate layers instead of the loops, as many steps: the looped model's FLOPs at its trained depth,
                 more parameters.
iso-wall-time    the iso-parameter model at its rate, for as many minutes as the looped one took: the same time and
                 parameters, more tokens.

Baselines see all tokens where the looped model has a window, beyond which it looks by looping: a window adds no
parameters, and one windowed layer could not see what is asked. Each run is a folder made by `looplm train`; a finished
run is not repeated.
"""

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looplm.checkpoint import CONFIG, LoadedRun, checkpoints, load_run, read_state, write_text
from looplm.config import apply_overrides, parse, to_yaml
from looplm.data.bytes import BytesConfig
from looplm.data.prepared import PreparedConfig
from looplm.data.sources import PermutationsConfig, held_out_text, parse_data, row_length
from looplm.errors import ConfigError, TrainingError
from looplm.eval.interval import T95, mean_and_half
from looplm.eval.loops import bits_per_byte, held_out_batches, held_out_loss, trained_depth
from looplm.eval.reasoning import as_reasoner, evaluate, held_out_questions
from looplm.eval.staircase import evaluate_staircase
from looplm.files import lock_folder
from looplm.model.count import Count, count
from looplm.reading import read_yaml
from looplm.train.interrupt import WITH_PARENT, ending_like_ctrl_c
from looplm.train.options import Position
from looplm.train.run import RunConfig, with_absolute_paths

ARMS = ("looped", "iso-parameter", "iso-FLOP", "iso-wall-time")
RATES = (0.5, 1.0, 2.0)  # times the recipe's
TUNING_SHARE = 0.25  # of the steps
N_QUESTIONS, N_SEQUENCES = 100, 500  # of each task; of each length
N_DRAWS = 256  # of the plan, to see whether it ever loops
LENGTHS = (1, 2, 4)  # times the longest sequence trained on


@dataclass(frozen=True)
class Run:
    """One training to make or made."""

    arm: str
    folder: Path
    config: RunConfig


@dataclass(frozen=True)
class Arm:
    """The results of one arm; lists are by seed."""

    name: str
    parameters: int
    training_flops_per_token: int
    n_loops: int
    rate: float
    tuning: dict[str, float]
    """Held-out loss by rate."""
    tokens: list[int]
    minutes: list[float]
    scores: dict[str, list[float]]


class Comparison:
    """One recipe compared, in folder `out`. `minutes` decides the steps of every run: four times as many as the looped
    model makes in a quarter of them, at its start. `n_jobs` run at a time, each with its share of the cores."""

    def __init__(
        self, config: RunConfig, out: Path, *, minutes: float, n_seeds: int, n_jobs: int, say: Callable[[str], None]
    ) -> None:
        if not 2 <= n_seeds <= len(T95) + 1:
            raise ConfigError(f"{n_seeds} seeds give no interval; give 2 to {len(T95) + 1}")
        if n_jobs < 1 or not minutes > 0:
            raise ConfigError(f"jobs {n_jobs} and minutes {minutes:g} have to be more than 0")
        self.out, self.minutes, self.n_seeds, self.n_jobs, self.say = out, minutes, n_seeds, n_jobs, say
        self.n_threads = max(1, torch.get_num_threads() // n_jobs)  # all cores, or what OMP_NUM_THREADS leaves
        self.configs = arms(with_absolute_paths(config))
        self.children: set[subprocess.Popen[str]] = set()
        self.is_ending = False
        self.guard = threading.Lock()  # of these two

    @property
    def expected_minutes(self) -> float:
        """Wall time of all runs if every one takes as long as the looped one."""
        tuned = len(self.configs) - 1
        runs = tuned * len(RATES) * TUNING_SHARE + len(ARMS) * self.n_seeds
        return runs * self.minutes / self.n_jobs

    def run(self) -> list[Arm]:
        """Train what is not yet trained, score all.

        Raises:
            FolderError: another comparison is at work in the folder.
            KeyboardInterrupt: at Ctrl-C, SIGTERM and SIGHUP, once the runs that were training have saved themselves.
        """
        with lock_folder(self.out), ending_like_ctrl_c():
            return self._run_all()

    def _run_all(self) -> list[Arm]:
        first = self._run("looped", rate=1.0, seed=0, minutes=self.minutes * TUNING_SHARE)
        self._train([first])
        n_tuning = position(first.folder).step
        tuning = {
            (arm, rate): self._run(arm, rate=rate, seed=0, steps=n_tuning)
            for arm in self.configs
            if arm != "iso-wall-time"
            for rate in RATES
            if (arm, rate) != ("looped", 1.0)
        }
        self._train(list(tuning.values()))
        tuning["looped", 1.0] = first
        losses = {key: loss_of(load_run(each.folder)) for key, each in tuning.items()}
        best = {arm: min(RATES, key=lambda rate, arm=arm: losses[arm, rate]) for arm in ARMS[:3]}  # type: ignore[misc]
        best["iso-wall-time"] = best["iso-parameter"]
        n_steps = round(n_tuning / TUNING_SHARE)
        seeds = range(self.n_seeds)
        runs = [self._run(arm, rate=best[arm], seed=seed, steps=n_steps) for arm in ARMS[:3] for seed in seeds]
        self._train(runs)
        spent = statistics.mean(position(each.folder).seconds / 60 for each in runs[: self.n_seeds])
        longer = [self._run("iso-wall-time", rate=best["iso-wall-time"], seed=seed, minutes=spent) for seed in seeds]
        self._train(longer)
        runs += longer
        found = []
        for name in ARMS:
            self.say(f"scoring {name}")
            mine = [each for each in runs if each.arm == name]
            scores = [score(load_run(each.folder)) for each in mine]
            depth = trained_depth(load_run(mine[0].folder)) if name == "looped" else 1
            size = count_trained(mine[0].config, n_loops=depth)
            found.append(
                Arm(
                    name,
                    size.parameters,
                    size.training_flops_per_token,
                    depth,
                    best[name],
                    {f"{rate:g}": losses[name, rate] for rate in RATES if (name, rate) in losses},
                    [position(each.folder).tokens for each in mine],
                    [position(each.folder).seconds / 60 for each in mine],
                    {metric: [each[metric] for each in scores] for metric in scores[0]},
                )
            )
        return found

    def _run(self, arm: str, *, rate: float, seed: int, steps: int | None = None, minutes: float | None = None) -> Run:
        config = self.configs[arm]
        optimizer = config.train.optimizer
        changes = [
            f"train.seed={seed}",
            f"train.steps={'null' if steps is None else steps}",
            f"train.minutes={'null' if minutes is None else minutes}",
            "train.tokens=null",
            "train.flops=null",
            f"train.optimizer.muon_lr={optimizer.muon_lr * rate}",
            f"train.optimizer.adamw_lr={optimizer.adamw_lr * rate}",
            f"train.runtime.n_threads={self.n_threads}",
        ]
        data = apply_overrides(config.model_dump(mode="json"), changes)
        length = f"{steps}-steps" if minutes is None else f"{minutes:.3g}-minutes"
        name = f"{arm}-rate-{rate:g}-{length}-seed-{seed}"
        return Run(arm, self.out / "runs" / name, parse(RunConfig, data, source=name))

    def _train(self, runs: Sequence[Run]) -> None:
        """Train the runs that are not finished, `n_jobs` at a time."""
        for run in runs:
            check_is_same(run)
        self.is_ending = False
        with ThreadPoolExecutor(self.n_jobs) as pool:
            try:
                for _ in pool.map(self._train_one, [each for each in runs if not is_finished(each)]):
                    pass
            except BaseException:  # after a failure or a signal no child runs on unwatched: each saves first
                self._end_children()
                raise

    def _end_children(self) -> None:
        with self.guard:
            self.is_ending = True
            for child in self.children:
                child.terminate()

    def _train_one(self, run: Run) -> None:
        self.say(f"training {run.folder.name}")
        if checkpoints(run.folder):
            words = ["--resume", str(run.folder)]
        else:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            recipe = run.folder.with_name(f"{run.folder.name}.yaml")
            write_text(recipe, to_yaml(run.config))
            words = [str(recipe), "--out", str(run.folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.n_threads), WITH_PARENT: "1"}
        command = [sys.executable, "-m", "looplm", "train", *words]
        with self.guard:
            if self.is_ending:
                return
            child = subprocess.Popen(
                command,
                env=environment,
                text=True,
                encoding="utf-8",
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self.children.add(child)
        printed, _ = child.communicate()
        with self.guard:
            self.children.discard(child)
        if child.returncode or not is_finished(run):
            said = next((line for line in reversed(printed.splitlines()) if line.strip()), "it said nothing")
            raise TrainingError(
                f"{run.folder.name} did not end ({said.removeprefix('error: ')}); what was done is kept: mend that and "
                "give the same command again"
            )


def arms(config: RunConfig) -> dict[str, RunConfig]:
    """The looped recipe and its baselines.

    Raises:
        ConfigError: nothing loops, the data would not be the same for all, or it cannot be scored.
    """
    model, data = config.model, config.data
    if model.n_loops < 2:
        raise ConfigError("the recipe's model runs 1 loop: there is no loop to compare; give model.n_loops=4")
    if _most_loops(config) < 2:
        raise ConfigError(
            "the recipe's plan trains 1 loop, so that it would be compared with itself: give a plan of more, as "
            "train.plan={kind: fixed, n_loops: 4}"
        )
    depth = model.n_loops
    if isinstance(data, PermutationsConfig):
        depth, longest = data.max_len, LENGTHS[-1] * data.max_len + 1
        if data.gate is not None:
            raise ConfigError("data.gate draws sequences by how well a model does: give all the same, data.gate=null")
        if depth < 2:
            raise ConfigError("sequences of 1 are tracked in 1 loop: there is no loop to compare; give data.max_len=12")
        if longest > model.seq_len:
            raise ConfigError(
                f"sequences of {longest} tokens are scored, and the model's context is {model.seq_len}: give "
                f"model.seq_len={longest} or a smaller data.max_len"
            )
    elif isinstance(data, BytesConfig | PreparedConfig):
        held_out_text(data)
    once = ["model.n_loops=1", "train.plan={kind: fixed, n_loops: 1}", "train.loop_loss=null", "train.state_loss=null"]
    if config.train.exit_gate is not None:
        once += ["train.exit_gate=null", "model.exit={kind: none}"]
    if getattr(model.block.attention, "window", None) is not None:
        once += ["model.block.attention.window=null", "model.block.attention.window_pattern=S"]
    deep = [*once, f"model.n_core={depth * model.n_core}", "model.inject={kind: none}"]
    whole = config.model_dump(mode="json")
    parameter, flop = (
        parse(RunConfig, apply_overrides(whole, changes), source=name)
        for name, changes in (("iso-parameter", once), ("iso-FLOP", deep))
    )
    return {"looped": config, "iso-parameter": parameter, "iso-FLOP": flop, "iso-wall-time": parameter}


def _most_loops(config: RunConfig) -> int:
    """The most loops of some plans that the recipe draws."""
    length = row_length(config.data)
    draws = (np.random.default_rng(seed) for seed in range(N_DRAWS))
    return max(config.train.plan.sample(draw, n_tokens=length, n_rows=1).n_loops for draw in draws)


def count_trained(config: RunConfig, *, n_loops: int) -> Count:
    """Sizes of a run's model, FLOPs at the context that it trains with."""
    data = config.data
    length = row_length(data)
    return count(config.model.model_copy(update={"seq_len": length}), n_loops=n_loops)


def position(folder: Path) -> Position:
    """How far a run has come."""
    return Position(**read_state(folder)["position"])


def is_finished(run: Run) -> bool:
    """Whether its budget is used."""
    return bool(checkpoints(run.folder)) and run.config.train.progress(position(run.folder)) >= 1


def check_is_same(run: Run) -> None:
    """Refuse a folder that holds a run of another recipe."""
    if not checkpoints(run.folder):
        return
    old, new = (_flat(data) for data in (read_yaml(run.folder / CONFIG), run.config.model_dump(mode="json")))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{str(run.folder)!r} was trained with {key}={old.get(key)}, and this comparison asks for "
                f"{new.get(key)}: give another --out"
            )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def loss_of(loaded: LoadedRun) -> float:
    """Held-out loss at the trained depth, nats."""
    data = parse_data(loaded.config["data"], source=str(loaded.path))
    return held_out_loss(loaded.model, held_out_batches(data), n_loops=depth_of(loaded))


def depth_of(loaded: LoadedRun) -> int:
    """The trained depth of a looped model, 1 of a baseline."""
    return 1 if loaded.model.config.n_loops == 1 else trained_depth(loaded)


def score(loaded: LoadedRun) -> dict[str, float]:
    """The metrics of a run for the report, the headline first."""
    data = parse_data(loaded.config["data"], source=str(loaded.path))
    if isinstance(data, BytesConfig | PreparedConfig):
        text, n_loops = held_out_text(data), depth_of(loaded)
        bits = bits_per_byte(loaded.model, held_out_batches(data), text.token_bytes, n_loops=n_loops)
        return {"bits per byte": bits}
    kind, loss = data.kind, loss_of(loaded)
    if kind == "reasoning":
        result = evaluate(as_reasoner(loaded, run=loaded.path), held_out_questions(N_QUESTIONS))
        return {"right answers, %": 100 * result.mean_accuracy, "loss, nats per token": loss}
    longest = loaded.config["data"]["max_len"]
    rule = "1" if loaded.model.config.n_loops == 1 else "1.5n"
    rows = evaluate_staircase(
        loaded.model, lengths=[times * longest for times in LENGTHS], rules=[rule], n_sequences=N_SEQUENCES
    )
    return {f"sequences of {row.length} all right, %": 100 * row.exact.accuracy for row in rows}


def verdicts(found: Sequence[Arm]) -> list[str]:
    """The looped model against each baseline on the headline metric, paired by seed: a line each."""
    looped, *others = found
    metric = next(iter(looped.scores))
    better = -1 if is_lower_better(metric) else 1
    lines = []
    for other in others:
        differences = [better * (a - b) for a, b in zip(looped.scores[metric], other.scores[metric], strict=True)]
        mean, half = mean_and_half(differences)
        said = "better" if mean - half > 0 else "worse" if mean + half < 0 else "not told apart"
        lines.append(f"{metric}: looped against {other.name}: {said} ({mean:+.3g} ± {half:.2g}, positive is for loops)")
    return lines


def is_lower_better(metric: str) -> bool:
    """Whether a metric is a loss."""
    return metric.startswith(("bits", "loss"))


def markdown(found: Sequence[Arm], *, title: str, command: str, machine: str) -> str:
    """The report, flattering or not."""
    n_seeds = len(found[0].minutes)
    metrics = list(found[0].scores)
    head = ["arm", "parameters", "FLOPs/token, training", "rate", "tokens", "minutes", *metrics]
    lines = [f"# {title}", "", f"`{command}`, {machine}. Means over {n_seeds} seeds (0 to {n_seeds - 1}) with 95 %"]
    lines += ["intervals of the mean (Student's t); rates were chosen by held-out loss among 0.5, 1 and 2 times the"]
    lines += ["recipe's after a quarter of the steps, for every arm alike and on text that is scored too.", ""]
    lines += [f"- {line}" for line in verdicts(found)]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in found:
        cells = [arm.name, f"{arm.parameters:,}", f"{arm.training_flops_per_token / 1e6:.1f}M", f"{arm.rate:g}"]
        cells += [f"{statistics.mean(arm.tokens) / 1e6:.2f}M", f"{statistics.mean(arm.minutes):.2f}"]
        for metric in metrics:
            mean, half = mean_and_half(arm.scores[metric])
            cells.append(f"{mean:.3f} ± {half:.3f}" if is_lower_better(metric) else f"{mean:.1f} ± {half:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![every seed, and the mean with its interval](report.png)", ""]
    lines += ["looped: the recipe. iso-parameter: the same model run once, as many steps. iso-FLOP: separate layers"]
    lines += [f"instead of {found[0].n_loops} loops, as many steps. iso-wall-time: the iso-parameter model, trained"]
    lines += ["as long as the looped one. Baselines have no window.", ""]
    return "\n".join(lines)


def as_records(found: Sequence[Arm]) -> list[dict[str, Any]]:
    """As JSON."""
    return [asdict(arm) for arm in found]
