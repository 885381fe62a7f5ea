"""Training: it learns, it repeats, it resumes bit for bit, it stops cleanly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conftest import long, tiny_config
from copying import Copying
from looplm.checkpoint import checkpoints, latest_checkpoint, load, read_tensors
from looplm.data.pack import IGNORE, Batch
from looplm.data.sources import PermutationsConfig, PermutationsSource
from looplm.errors import CheckpointError, ConfigError, DataError, TrainingError
from looplm.model.count import count
from looplm.model.loop.plan import (
    LoopPlan,
)
from looplm.model.looped import LoopedLM
from looplm.telemetry.sinks import JsonlSink, Record
from looplm.train import runtime
from looplm.train.fit import fit
from looplm.train.losses import next_token_loss
from looplm.train.options import TrainConfig
from looplm.train.run import resolve_run, resume_run, start_run
from looplm.train.runtime import Runtime

CPU = {"device": "cpu", "precision": "fp32", "compile": False, "n_threads": 1}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(latest_checkpoint(folder) / "model.safetensors")


def interrupt_at(step: int) -> Callable[[Record], None]:
    """An observer that does what Ctrl-C does."""

    def interrupt(record: Record) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return interrupt


def assert_same_run(one: Path, two: Path) -> None:
    """The same weights and optimizer state, bit for bit."""
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (read_tensors(latest_checkpoint(folder) / name) for folder in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_looped_model_learns_to_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LoopedLM(
        tiny_config(
            "n_prelude=0", "n_coda=0", "d_model=32", "smear={kind: channel, n_back: 1}", "init=scaled", "init_std=1.0"
        )
    )
    plan = {"kind": "uniform", "low": 1, "high": 2}
    config = TrainConfig(steps=150, plan=plan, n_workers=0, runtime=CPU)  # type: ignore[arg-type]
    fit(model, Copying(), config, folder=tmp_path)
    model.eval()
    batch = Copying().batch(10**6)
    chosen = model(batch.ids).logits.argmax(-1)
    scored = batch.targets != IGNORE
    assert (chosen == batch.targets)[scored].float().mean() > 0.98


@pytest.mark.parametrize(
    "override",
    [
        "train.state_loss={jacobian: 0.1, norm: 0.01}",
        "train.loop_loss={share: 0.3}",
        "train.plan={kind: poisson, mean: 2}",
        "train.plan={kind: lognormal_poisson, mean: 2, n_grad: 2}",
    ],
)
def test_what_trains_for_depth_resumes_exactly(tmp_path: Path, tiny_reason: list[str], override: str) -> None:
    config = resolve_run("reason", overrides=[*tiny_reason, override])
    start_run(config, tmp_path / "whole")
    start_run(config, tmp_path / "parts", observers=(interrupt_at(3),))
    assert resume_run(tmp_path / "parts").position.step == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("recipe", "stop_at"), [("reason", 4), ("s3", 1), *long(("reason", 1), ("s3", 4))])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_reason: list[str], recipe: str, stop_at: int
) -> None:
    overrides = [text for text in tiny_reason if recipe == "reason" or text.startswith("train.")]
    overrides += ["train.plan={kind: uniform, low: 1, high: 3}", "train.accumulate=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start_run(resolve_run(recipe, overrides=overrides), whole)

    result = start_run(resolve_run(recipe, overrides=overrides), parts, observers=(interrupt_at(stop_at),))
    assert result.interrupted
    assert result.position.step == stop_at
    assert resume_run(parts).position.step == 6
    assert_same_run(whole, parts)
    losses = [
        [(r["step"], r["loss"], r["n_loops"]) for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())]
        for f in (whole, parts)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("most_kills", "n_steps"), [(1, 15), *long((3, 40))])
def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(
    tmp_path: Path, tiny_reason: list[str], most_kills: int, n_steps: int
) -> None:
    """SIGKILL: no handler runs, whatever was being written stays half written."""
    overrides = [*tiny_reason, f"train.steps={n_steps}", "train.checkpoint_steps=3", "train.n_workers=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start_run(resolve_run("reason", overrides=overrides), whole)
    rng, n_kills = random.Random(0), 0
    while True:
        base = [sys.executable, "-m", "looplm", "train"]
        new = ["reason", "--out", str(killed), *overrides]
        command = base + (["--resume", str(killed)] if checkpoints(killed) else new)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        reached = len(checkpoints(killed)) and int(checkpoints(killed)[-1].name[5:])
        deadline = time.monotonic() + 120
        while n_kills < most_kills and process.poll() is None and time.monotonic() < deadline:
            found = checkpoints(killed)
            if found and int(found[-1].name[5:]) > reached:
                time.sleep(rng.uniform(0, 0.05))
                os.killpg(process.pid, signal.SIGKILL)
                n_kills += 1
                break
            time.sleep(0.005)
        _, error = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
    assert n_kills >= 1
    assert_same_run(whole, killed)


def test_seeds_decide_the_run(tmp_path: Path, tiny_reason: list[str]) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start_run(resolve_run("reason", overrides=[*tiny_reason, f"train.seed={seed}"]), tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_a_non_finite_loss_stops_before_the_optimizer_moves(tmp_path: Path) -> None:
    model = LoopedLM(tiny_config())

    class Poisoned(Copying):
        def batch(self, index: int) -> Batch:
            if index == 3:
                torch.nn.init.constant_(model.norm.weight, float("nan"))
            return super().batch(index)

    before: dict[str, torch.Tensor] = {}

    def keep(record: Record) -> None:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    plan = {"kind": "fixed", "n_loops": 1}
    config = TrainConfig(steps=9, plan=plan, n_workers=0, log_every=1, checkpoint_steps=2, runtime=CPU)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"step 4: loss is nan.*stopped before the optimizer moved.*step-00000002"):
        fit(model, Poisoned(), config, folder=tmp_path, observers=(keep,))
    for name, tensor in model.state_dict().items():
        if name != "norm.weight":
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("budget", "steps"), [({"steps": 3}, 3), ({"tokens": 12 * 32 * 4}, 4)])
def test_budgets_end_the_run(tmp_path: Path, budget: dict[str, int], steps: int) -> None:
    config = TrainConfig(**budget, plan={"kind": "fixed", "n_loops": 1}, n_workers=0, runtime=CPU)  # type: ignore[arg-type]
    assert fit(LoopedLM(tiny_config()), Copying(), config, folder=tmp_path).position.step == steps


def test_a_budget_in_flops_is_what_count_says(tmp_path: Path, tiny_reason: list[str]) -> None:
    changes = [*tiny_reason, "train.steps=null", "train.plan={kind: uniform, low: 1, high: 3}"]
    config = resolve_run("reason", overrides=[*changes, "train.flops=2.0e9"])
    result = start_run(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({record["n_loops"] for record in records}) > 1
    model = config.model.model_copy(update={"seq_len": 336})
    spent = [2 * 336 * count(model, n_loops=round(r["n_loops"])).training_flops_per_token for r in records]
    assert result.position.flops == pytest.approx(sum(spent))
    assert sum(spent[:-1]) < 2e9 <= sum(spent)
    assert all(record["tflops"] > 0 and record["memory_gb"] > 0.05 for record in records)
    assert all(0 < record["mfu"] < 1 for record in records)


def test_a_budget_in_minutes_is_wall_time(tmp_path: Path) -> None:
    config = TrainConfig(minutes=0.02, plan={"kind": "fixed", "n_loops": 1}, n_workers=0, runtime=CPU)  # type: ignore[arg-type]
    result = fit(LoopedLM(tiny_config()), Copying(), config, folder=tmp_path)
    assert result.position.seconds >= 1.2
    assert result.position.step > 1


def test_metrics_tell_loss_speed_and_waiting(tmp_path: Path, tiny_reason: list[str]) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    for record in records:
        assert record["loss"] > 0
        assert record["tokens_per_second"] > 0
        assert 0 <= record["waiting_share"] <= 1


EXPERTS = [
    "model.core_ffn={kind: moe, n_experts: 4, d_ff: 16, top_k: 2, has_bias: true, bias_rate: 0.01, balance_loss: 0.01}",
    "model.block.ffn.d_ff=32",
]


def test_the_router_bias_follows_the_load_and_is_resumed(tmp_path: Path, tiny_reason: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start_run(resolve_run("reason", overrides=[*tiny_reason, *EXPERTS]), whole)

    start_run(resolve_run("reason", overrides=[*tiny_reason, *EXPERTS]), parts, observers=(interrupt_at(3),))
    assert resume_run(parts).position.step == 6
    assert_same_run(whole, parts)
    bias = weights(whole)["core.0.ffn.bias"]
    assert 0.005 < bias.abs().max() <= 0.0601
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= record["max_load"] <= 2 for record in records)  # of 4 experts, 2 of which take all tokens at worst


def test_the_router_is_balanced_beside_a_gate_too(tmp_path: Path, tiny_reason: list[str]) -> None:
    gate = ["model.exit={kind: gate}", "train.exit_gate={alone: 0.5}", "train.plan={kind: fixed, n_loops: 2}"]
    start_run(resolve_run("reason", overrides=[*tiny_reason, *EXPERTS, *gate]), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["max_load" in record for record in records] == [True] * 3 + [False] * 3
    assert weights(tmp_path / "run")["core.0.ffn.bias"].abs().max() > 0


def test_recomputing_loops_trains_the_same(tmp_path: Path, tiny_reason: list[str]) -> None:
    for name in ("kept", "recomputed"):
        overrides = [*tiny_reason, *EXPERTS, f"train.recompute={str(name == 'recomputed').lower()}"]
        start_run(resolve_run("reason", overrides=overrides), tmp_path / name)
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


@pytest.mark.long
def test_compiled_experts_and_recomputed_loops_train(tmp_path: Path, tiny_reason: list[str]) -> None:
    runtime = "train.runtime={device: cpu, precision: bf16, compile: true, n_threads: 1}"
    plan = "train.plan={kind: uniform, low: 1, high: 3}"
    eager = start_run(resolve_run("reason", overrides=[*tiny_reason, *EXPERTS, plan]), tmp_path / "eager")
    config = resolve_run("reason", overrides=[*tiny_reason, *EXPERTS, runtime, plan, "train.recompute=true"])
    assert start_run(config, tmp_path / "run").final_loss == pytest.approx(eager.final_loss, abs=0.05)


def test_compiled_and_bf16_runs_train(tmp_path: Path, tiny_reason: list[str]) -> None:
    """The runtime the 15-minute recipe uses, and finite gradients under it (docs/log.md, 2026-11-21)."""
    runtime = "train.runtime={device: cpu, precision: bf16, compile: true, n_threads: 1}"
    config = resolve_run("reason", overrides=[*tiny_reason, runtime, "train.steps=4"])
    result = start_run(config, tmp_path / "run")
    assert result.position.step == 4
    assert 0 < result.final_loss < 7


def test_the_probe_picks_precision_and_threads_and_a_resume_keeps_them(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_reason, "train.runtime.precision=auto", "train.runtime.n_threads=auto"]
    tried = []

    def seconds(trial: object, candidate: Runtime) -> float:
        tried.append((candidate.precision, candidate.n_threads))
        return real_seconds(trial, candidate) if candidate.precision == "bf16" else 1e6  # type: ignore[arg-type]

    real_seconds = runtime._seconds
    monkeypatch.setattr(runtime, "_seconds", seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    start_run(resolve_run("reason", overrides=overrides), tmp_path / "run")
    assert tried == [("bf16", 2), ("fp32", 2), ("bf16", 1)]
    state = json.loads((latest_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["runtime"]["precision"] == "bf16"
    resume_run(tmp_path / "run", overrides=["train.steps=7"])
    after = json.loads((latest_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert after["runtime"] == state["runtime"]
    assert after["position"]["step"] == 7


def test_a_plan_by_sequence_is_refused_where_an_exit_mixes_the_states(tiny_reason: list[str]) -> None:
    overrides = [*tiny_reason, "train.plan={kind: poisson, mean: 2}", "model.exit={kind: act}"]
    with pytest.raises(ConfigError, match="leave one of them out"):
        resolve_run("reason", overrides=overrides)


def test_loops_are_drawn_independently_of_the_lengths_they_go_with(tmp_path: Path, tiny_reason: list[str]) -> None:
    """Both come from (seed, step); from the same stream, length 12 would always get the same number of extra loops."""
    seen: set[tuple[int, int]] = set()

    class Watched(PermutationsSource):
        def batch(self, index: int) -> Batch:
            batch = super().batch(index)
            lengths[index] = batch.ids.shape[1] - 1
            return batch

    lengths: dict[int, int] = {}
    overrides = [text for text in tiny_reason if text.startswith("train.")]
    config = resolve_run("s3", overrides=[*overrides, "train.steps=120", "data={batch_size: 1, max_len: 4, n_ramp: 0}"])
    assert isinstance(config.data, PermutationsConfig)
    source = Watched(config.data, seed=0)

    def watch(record: Record) -> None:
        length = lengths[int(record["step"]) - 1]
        seen.add((length, int(record["n_loops"]) - length))

    fit(LoopedLM(config.model), source, config.train, folder=tmp_path, observers=(watch,))
    assert seen == {(length, extra) for length in (2, 3, 4) for extra in (0, 1, 2)}


def test_a_taken_folder_an_unwritable_one_and_a_missing_one_are_refused(tmp_path: Path, tiny_reason: list[str]) -> None:
    config = resolve_run("reason", overrides=tiny_reason)
    start_run(config, tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        start_run(config, tmp_path / "run")
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path / "run").items())
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        start_run(config, tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="no run folder"):
        resume_run(tmp_path / "none")


def test_an_interrupted_run_still_loads(tmp_path: Path, tiny_reason: list[str]) -> None:
    def interrupt(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run", observers=(interrupt,))
    assert load(tmp_path / "run").config.d_model == 32


@pytest.mark.parametrize(
    "override", ["train.seed=3", "model.d_model=64", "data.n_rows=9", "train.runtime.precision=bf16"]
)
def test_a_resume_refuses_what_would_make_it_another_run(tmp_path: Path, tiny_reason: list[str], override: str) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="cannot change on resume"):
        resume_run(tmp_path / "run", overrides=["train.steps=9", override])
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_used_up_budget_says_so(tmp_path: Path, tiny_reason: list[str]) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is used up: .* 6 steps.*counted from the start"):
        resume_run(tmp_path / "run")


def test_a_text_that_changed_under_a_run_is_refused(tmp_path: Path, tiny_reason: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 100)
    changes = [f"data.path={text}", "data.row_len=32", *(each for each in tiny_reason if each.startswith("train."))]
    run = tmp_path / "run"
    start_run(resolve_run("text", overrides=changes), run, observers=(interrupt_at(2),))
    text.write_text("to be or not to be; " * 100)
    with pytest.raises(CheckpointError, match="has changed since it began: put back"):
        resume_run(run)
    text.write_text("to be or not to be, " * 100)
    assert resume_run(run).position.step == 6


def test_a_run_stopped_before_its_first_checkpoint_resumes_from_the_start(
    tmp_path: Path, tiny_reason: list[str]
) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    config = (tmp_path / "whole" / "config.yaml").read_text()
    (tmp_path / "bare" / "config.yaml").write_text(config)
    resume_run(tmp_path / "bare")
    assert_same_run(tmp_path / "whole", tmp_path / "bare")


def test_a_killed_runs_extra_metrics_are_written_once(tmp_path: Path, tiny_reason: list[str]) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    resume_run(tmp_path / "run", overrides=["train.steps=8"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_metrics_that_cannot_be_written_stop_the_run_after_a_checkpoint(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: JsonlSink, record: Record) -> None:
        raise TrainingError("metrics.jsonl could not be written (No space left on device); free space and resume")

    monkeypatch.setattr(JsonlSink, "write", full)
    with pytest.raises(TrainingError, match="free space and resume"):
        start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run").name == "step-00000001"


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        ("reason", "model.vocab_size=256", "raise vocab_size"),
        ("reason", "model.seq_len=100", "do not fit the model's seq_len 100"),
        ("reason", "train.plan={kind: length}", "rows of text have none"),
        ("reason", "data.row_len=64", "greater than or equal to 336"),
        ("s3", "model.n_outputs=5", "take looplm-s3-54k"),
        ("s3", "data.max_len=300", "do not fit"),
    ],
)
def test_model_data_and_plan_have_to_fit_together(recipe: str, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_run(recipe, overrides=[override])


def test_a_run_leaves_the_processs_threads_as_they_were(tmp_path: Path, tiny_reason: list[str]) -> None:
    torch.set_num_threads(2)
    try:
        start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, tiny_reason: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(record["step"], pytest.approx(record["loss"], rel=1e-5)) for record in records]


def test_weights_and_biases_gets_every_record_offline(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    start_run(resolve_run("reason", overrides=[*tiny_reason, "train.wandb=loops"]), tmp_path / "run")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # its own process writes the file, some time after the run has ended
    while kept.read_bytes().count(b"grad_norm") < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept.read_bytes().count(b"grad_norm") >= 6


def test_weights_and_biases_that_is_not_there_is_said(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'looplm\[track\]'"):
        start_run(resolve_run("reason", overrides=[*tiny_reason, "train.wandb=loops"]), tmp_path / "run")


def test_a_batch_without_scored_positions_is_refused() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(DataError, match="no position of this batch is scored"):
        next_token_loss(LoopedLM(tiny_config()), Batch(ids, torch.full_like(ids, IGNORE)), LoopPlan(1))


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("gated", ["plan", "data"])
def test_a_curriculum_goes_on_where_it_is_right_often_enough_and_resumes(tmp_path: Path, gated: str) -> None:
    words = ["train.minutes=null", "train.steps=60", "train.log_every=1", "train.runtime.device=cpu"]
    words += ["data.batch_size=8", "data.max_len=6", "train.runtime.n_threads=1", "model.d_model=32"]
    easy, hard = (
        [f"train.plan={{kind: curriculum, low: 1, high: 4, accuracy: {gate}}}"]
        if gated == "plan"
        else [f"data.gate={gate}"]
        for gate in (0.01, 1.0)
    )
    start_run(resolve_run("s3", overrides=[*words, *hard]), tmp_path / "hard")
    assert not any("level" in record for record in records(tmp_path / "hard"))
    observers = (interrupt_at(30),)
    start_run(resolve_run("s3", overrides=[*words, *easy]), tmp_path / "cut", observers=observers)
    resume_run(tmp_path / "cut")
    start_run(resolve_run("s3", overrides=[*words, *easy]), tmp_path / "whole")
    assert [record.get("level", 0) for record in records(tmp_path / "whole")][19::20] == [1, 2, 3]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_gate_is_trained_with_the_model_and_then_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LoopedLM(tiny_config("inject.kind=diagonal", "exit.kind=gate"))
    plan = {"kind": "fixed", "n_loops": 3}
    seen: list[dict[str, torch.Tensor]] = []

    def look(record: Record) -> None:
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    config = TrainConfig(
        steps=20,
        plan=plan,
        n_workers=0,
        runtime=CPU,
        log_every=1,
        exit_gate={"alone": 0.5},  # type: ignore[arg-type]
    )
    fit(model, Copying(), config, folder=tmp_path, observers=(look,))
    moved = [{name for name in one if not torch.equal(one[name], two[name])} for one, two in pairwise(seen)]
    assert "embed.weight" in moved[5]
    assert set().union(*moved[10:]) == {"exit.gate.weight", "exit.gate.bias"}
