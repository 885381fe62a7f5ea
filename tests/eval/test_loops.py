"""The dial: what is measured, and what is said of it."""

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from looplm.checkpoint import LoadedRun
from looplm.cli.app import app
from looplm.data.pack import IGNORE
from looplm.data.sources import ReasoningConfig, ReasoningSource, parse_data
from looplm.data.tasks.example import is_test_question
from looplm.errors import CheckpointError, ConfigError
from looplm.eval.interval import Score
from looplm.eval.loops import (
    Dial,
    DialRow,
    StateAt,
    diagnose,
    dial_counts,
    dial_work,
    follow_states,
    held_out_batches,
    held_out_loss,
    measure_dial,
)
from looplm.eval.plots import dial_plot
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.train.run import resolve_run


@pytest.fixture
def s3_run() -> LoadedRun:
    config = resolve_run("s3", overrides=["data.max_len=6"])
    torch.manual_seed(0)
    return LoadedRun(LoopedLM(config.model).eval(), config.model_dump(mode="json"), Path("s3"))


def states(*, change: float, rate: float, growth: float, n: int = 16) -> list[StateAt]:
    """A state whose relative change shrinks by `rate` and whose size grows by `growth` per loop."""
    return [StateAt(loop, growth**loop, change * rate**loop if loop > 1 else None) for loop in range(1, n + 1)]


@pytest.mark.parametrize(
    ("change", "rate", "growth", "kind"),
    [
        (0.5, 0.7, 1.0, "settling"),
        (0.5, 0.97, 1.0, "marginal"),
        (0.5, 1.0, 1.0, "drifting"),
        (0.5, 1.1, 1.0, "drifting"),
        (0.5, 0.7, 1.1, "drifting"),  # the state grows threefold
        (1e-4, 0.99, 1.0, "settling"),  # hardly moves any more
    ],
)
def test_diagnosis(change: float, rate: float, growth: float, kind: str) -> None:
    found = diagnose(states(change=change, rate=rate, growth=growth), trained=4)
    assert found is not None
    assert found.kind == kind
    assert found.rate == pytest.approx(rate)
    assert found.growth == pytest.approx(growth**12)


def test_no_diagnosis_from_loops_that_did_not_run() -> None:
    assert diagnose(states(change=0.5, rate=0.5, growth=1, n=5), trained=4) is None


@pytest.mark.parametrize("trained", [1, 2, 3, 4, 12, 50])
def test_the_dial_goes_from_1_to_four_times_the_trained_depth(trained: int) -> None:
    counts = dial_counts(trained)
    assert counts == sorted(set(counts))
    assert {1, trained, max(1, trained // 2), 4 * trained} <= set(counts)
    assert counts[0] == 1
    assert counts[-1] == 4 * trained
    assert len(counts) <= 10


def test_the_verdict_claims_no_difference_that_the_questions_do_not_show() -> None:
    def dial(half: int, trained: int, deep: int) -> str:
        rows = [DialRow(n, Score(right, 200), 0.0) for n, right in ((1, 0), (2, half), (4, trained), (16, deep))]
        return Dial(4, "questions", rows).verdict

    same = dial(197, 199, 196)
    assert same.count("no difference that 200 answers show") == 2
    assert "half of them: 98.5 %" in same
    assert "up to 16: lowest at 16, 98.0 %" in same
    other = dial(100, 199, 20)
    assert "49.5 points lower" in other
    assert "89.5 points lower" in other
    assert "highest at 16, 99.5 % [97.2, 99.9] (49.5 points higher)" in dial(20, 100, 199)


def test_held_out_worked_solutions_are_of_test_questions_only() -> None:
    source = ReasoningSource(ReasoningConfig(), seed=0, held_out=True)
    for number in range(50):
        document = source.draw(random.Random(number))
        prompt = source.tokenizer.decode(document.ids[: document.n_prompt], skip_special_tokens=False)
        assert is_test_question(prompt.removeprefix("<INST>").removesuffix("</INST>"))


def test_loss_and_states_are_those_of_the_forward(s3_run: LoadedRun) -> None:
    model, batches = s3_run.model, held_out_batches(parse_data(s3_run.config["data"], source="s3"), n_batches=1)
    (batch,) = batches
    with torch.inference_mode():
        logits = model(batch.ids, n_loops=3).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    assert held_out_loss(model, batches, n_loops=3) == pytest.approx(float(expected), rel=1e-5)
    followed = follow_states(model, batches, n_loops=5)
    assert [state.loop for state in followed] == [1, 2, 3, 4, 5]
    assert followed[0].change is None
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        model.hidden(batch.ids, plan=LoopPlan(5), states=kept)
    scored = batch.targets != IGNORE
    old, new = kept[3][scored], kept[4][scored]
    assert followed[4].change == pytest.approx(float(((new - old).norm(dim=-1) / new.norm(dim=-1)).mean()), rel=1e-5)
    assert followed[4].norm == pytest.approx(float(new.square().mean().sqrt()), rel=1e-5)


def test_the_dial_of_a_run_is_measured_and_drawn(s3_run: LoadedRun) -> None:
    heard: list[float] = []
    dial = measure_dial(s3_run, counts=[1, 12], n=10, on_progress=heard.append)
    assert [row.loops for row in dial.rows] == [1, 6, 12]  # the trained depth is always among them
    assert sum(heard) == pytest.approx(dial_work([1, 6, 12], trained=6))
    assert dial.trained == 6
    assert len(dial.states) == 24
    assert dial_plot(dial).startswith(b"\x89PNG")
    assert json.loads(json.dumps(dial.as_dict()))["verdict"] == dial.verdict


def test_runs_of_other_data_are_refused(s3_run: LoadedRun) -> None:
    s3_run.config["data"] = {"kind": "recipes"}
    with pytest.raises(CheckpointError, match="was trained on 'recipes'"):
        measure_dial(s3_run, n=5)


@pytest.mark.long
def test_the_command_prints_a_row_per_number_and_the_verdict(tmp_path: Path) -> None:
    out, plot = tmp_path / "loops.json", tmp_path / "loops.png"
    arguments = ["eval", "builtin:reasoner", "--suite", "loops", "--n", "2", "--loops", "1,3"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out), "--plot", str(plot)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 *" in done.output
    found = json.loads(out.read_text())
    assert [row["loops"] for row in found["rows"]] == [1, 2, 3]
    assert all(row["n"] == 14 for row in found["rows"])
    assert found["verdict"].startswith("2 loops, as trained")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "loops", "--lengths", "4"], "--lengths is for the other suites"),
        (["--suite", "loops", "--harder"], "--harder is for the other suites"),
        (["--suite", "loops", "--loops", "0"], "--loops 0 is too small"),
        (["--plot", "x.png"], "add --suite loops"),
        (["--suite", "loops", "--plot", "nowhere/x.png"], "does not exist"),
        (["--suite", "dial"], "Suites: reasoning, s3, loops"),
    ],
)
def test_wrong_options_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["eval", "builtin:reasoner", *more], catch_exceptions=False)
